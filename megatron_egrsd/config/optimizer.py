"""The optimizer and its schedule."""

from dataclasses import dataclass
from typing import Literal

from megatron_egrsd.config.check import require, require_not_negative, require_positive


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Args:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of a decaying schedule.
        schedule: Shape after the warm-up.
        warmup_steps: Linear warm-up, in optimizer steps.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay; norms and biases are exempt.
        clip_grad: Global gradient norm is clipped to this; 0 switches clipping off.
        freeze_router: Of a mixture of experts, keep the router's weights as they are.
        updates_per_batch: Optimizer steps per rollout batch, each on an equal share of the prompts.
    """

    lr: float = 1e-6
    min_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    freeze_router: bool = False
    updates_per_batch: int = 1

    def __post_init__(self):
        require_positive(self, "optimizer", "lr", "eps", "updates_per_batch")
        require_not_negative(self, "optimizer", "warmup_steps", "weight_decay", "clip_grad")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; it must lie in [0, 1)")
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr must lie in [0, optimizer.lr]")
