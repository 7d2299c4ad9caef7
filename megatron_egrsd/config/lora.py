"""The adapters that are trained in place of the weights."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_egrsd.config.check import require

# The projections of a layer that can have an adapter, by their Hugging Face names, in the order of the layer.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION, *MLP)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): y = W x + alpha / rank * B A x, with A and B trained and W frozen.

    Args:
        rank: Rows of A and columns of B; 0 trains all weights instead (the paper's: 64).
        alpha: Scale of the adapters times their rank; null is twice the rank (the paper's).
        targets: Projections that get an adapter. Of a mixture of experts only those of attention can.
        init: Directory of an adapter in PEFT's format to start from. Its rank, alpha and targets replace those here.
        export: Files at the end of the run: the model with its adapters added in (output/hf), the adapters alone
            (output/adapter), or both.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    init: str = ""
    export: Literal["merged", "adapter", "both"] = "both"

    def __post_init__(self):
        require(self.rank >= 0, f"lora.rank is {self.rank}; it must not be negative")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha is {self.alpha}; it must be positive")
        require(bool(self.targets), "lora.targets is empty; name a projection, or set lora.rank to 0")
        for name in self.targets:
            require(name in TARGETS, f"lora.targets names {name!r}; the projections are {', '.join(TARGETS)}")
        require(len(set(self.targets)) == len(self.targets), "lora.targets names a projection twice")

    @property
    def enabled(self) -> bool:
        """True if adapters are trained, False if all weights are."""
        return self.rank > 0 or bool(self.init)

    @property
    def exports_model(self) -> bool:
        """True if the model is written at the end, adapters added in."""
        return not self.enabled or self.export != "adapter"

    @property
    def exports_adapter(self) -> bool:
        """True if the adapters alone are."""
        return self.enabled and self.export != "merged"
