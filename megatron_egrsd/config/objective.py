"""The objective, and the weights that the teacher scores with."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_egrsd.config.check import require


@dataclass(frozen=True)
class ObjectiveConfig:
    """GRPO, RLSD, EGRSD and CL-EGRSD: one family (docs/reference/method.md). Symbols of the papers in brackets.

    Args:
        preset: A member of the family by its name (objectives/presets.py). It sets the keys that make it one; any key
            that is given beside it overrides it.
        mix: Share of the likelihood ratio in the magnitude, in [0, 1] (lam; RLSD).
        ratio_clip: The ratio is clipped to [1 - ratio_clip, 1 + ratio_clip] (eps_w; RLSD).
        attenuation: How far the teacher's entropy may close the gate, in [0, 1) (alpha; EGRSD).
        lookahead: Tokens the gate looks ahead for a resolved entropy; 0 is EGRSD (K; CL-EGRSD).
        entropy_normalization: Scale of the entropy: batch quantile, sequence maximum or ln(vocabulary) (ours).
        entropy_quantile: The quantile p of "quantile" (ours).
        entropy_quantile_floor: Lower bound of the quantile, in nats (ours).
        advantage: Within-group standardised reward, or +1 / -1 by outcome.
        advantage_std: Divide the group advantage by the group's standard deviation.
        clip_low: PPO clip below 1 of the policy ratio.
        clip_high: PPO clip above 1 of the policy ratio.
        importance_cap: Cap C of the truncated importance weight pi_old / pi_rollout; null switches it off.
        kl_coef: Weight of the KL divergence to the initial weights in the loss (beta of GRPO); 0 switches it off, and
            saves a pass a step and a copy of the weights.
        loss_normalization: Mean over the tokens of the global batch, mean of sequence means, or fixed length.
        fixed_length: Tokens per rollout that "fixed" divides by.
        function: Import path of an objective of your own, "file.py:Class" or "module:Class"
            (docs/guides/extending.md); empty is the family.
        options: Its options by name.
    """

    preset: str = ""
    mix: float = 0.5
    ratio_clip: float = 0.2
    attenuation: float = 0.9
    lookahead: int = 2
    entropy_normalization: Literal["quantile", "max", "log_vocab"] = "quantile"
    entropy_quantile: float = 0.95
    entropy_quantile_floor: float = 0.5
    advantage: Literal["group", "outcome"] = "group"
    advantage_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float | None = None
    kl_coef: float = 0.0
    loss_normalization: Literal["token_mean", "seq_mean", "fixed"] = "token_mean"
    fixed_length: int = 0
    function: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require(0 <= self.mix <= 1, f"objective.mix is {self.mix}; it must lie in [0, 1]")
        require(0 <= self.ratio_clip <= 1, f"objective.ratio_clip is {self.ratio_clip}; it must lie in [0, 1]")
        require(
            0 <= self.attenuation < 1,
            f"objective.attenuation is {self.attenuation}; it must lie in [0, 1), "
            "so that every token keeps a positive weight",
        )
        require(self.lookahead >= 0, f"objective.lookahead is {self.lookahead}; it must not be negative")
        require(0 < self.entropy_quantile <= 1, "objective.entropy_quantile must lie in (0, 1]")
        require(self.entropy_quantile_floor >= 0, "objective.entropy_quantile_floor must not be negative")
        require(0 <= self.clip_low < 1, "objective.clip_low must lie in [0, 1)")
        require(self.clip_high >= 0, "objective.clip_high must not be negative")
        require(self.importance_cap is None or self.importance_cap > 0, "objective.importance_cap must be positive")
        require(self.kl_coef >= 0, f"objective.kl_coef is {self.kl_coef}; it must not be negative")
        require(
            self.loss_normalization != "fixed" or self.fixed_length > 0,
            'objective.loss_normalization is "fixed", so objective.fixed_length must be positive',
        )
        require(not self.options or bool(self.function), "objective.options are those of objective.function; set it")


@dataclass(frozen=True)
class TeacherConfig:
    """Whose weights the teacher scores with.

    Args:
        weights: The student's current weights, its initial weights, or their exponential moving average.
        ema_decay: Decay per step of "ema".
    """

    weights: Literal["live", "frozen", "ema"] = "live"
    ema_decay: float = 0.99

    def __post_init__(self):
        require(0 <= self.ema_decay < 1, "teacher.ema_decay must lie in [0, 1)")
