"""The objective, and the weights that the teacher scores with."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_egrsd.config.check import require, require_not_negative, require_positive


@dataclass(frozen=True)
class ObjectiveConfig:
    """EGRSD, CL-EGRSD and the objectives that they are compared with (docs/reference/method.md).

    The defaults are the paper's CL-EGRSD for Qwen3-4B (arXiv 2605.13255). In brackets: the papers' symbols, or "ours".

    Args:
        preset: An objective by its name: egrsd, cl_egrsd, gate_off, grpo, opsd, crisp, sft, rlcsd, sdpo, srpo, antisd
            or rlsd (objectives/presets.py). It sets every key of this section, and those of others that make it one;
            any key that is given beside it overrides it.
        mix: Share of the likelihood ratio in the magnitude, in [0, 1] (lam of RLSD; 1 in EGRSD).
        mix_decay_steps: Steps over which `mix` falls linearly to 0; 0 keeps it (RLSD).
        ratio_clip: The ratio is clipped to [1 - ratio_clip, 1 + ratio_clip] (eps; eq. 2).
        attenuation: Sensitivity of the gate to the teacher's entropy, in [0, 1]; 0 leaves the gate out (gamma; eq. 6).
        gate_floor: The gate never closes below this (eq. 6).
        lookahead: Tokens the gate looks ahead for a resolved entropy; 0 is EGRSD (W; eq. 8).
        entropy_normalization: Entropy that counts as 1: the maximum of the batch (eq. 5), its quantile, the maximum of
            the sequence, or ln(vocabulary) (the last three: ours).
        entropy_floor: Lower bound of the batch's maximum or quantile, in nats (eq. 5).
        entropy_quantile: The quantile of "quantile" (ours).
        advantage: Reward whitened by the running statistics of all earlier steps (eq. 9), standardised within the group
            of a prompt, or +1 / -1 by outcome (ours).
        advantage_warmup: Steps in which the running advantage is the reward minus `advantage_baseline`.
        advantage_baseline: See there.
        advantage_std: Divide the group advantage by the group's standard deviation.
        length_bonus: beta_L: a right response of T tokens is rewarded with 1 + beta_L (1 - T / max_response_tokens).
        loss: REINFORCE (eq. 7), or PPO's clipped policy ratio. With one update a batch their gradients are equal.
        clip_low: PPO clip below 1 of the policy ratio.
        clip_high: PPO clip above 1 of the policy ratio.
        importance_cap: Cap C of the truncated importance weight pi_old / pi_rollout; null switches it off.
        kl_coef: Weight of the KL divergence to the initial weights in the loss (beta of GRPO); 0 switches it off, and
            saves a pass a step and a copy of the weights.
        loss_normalization: Mean over the tokens of the global batch, mean of sequence means, or fixed length.
        fixed_length: Tokens per rollout that "fixed" divides by.
        score_temperature: Temperature at which student and teacher are scored; null is rollout.temperature.
        function: Import path of an objective of your own, "file.py:Class" or "module:Class" (docs/guides/extending.md);
            empty is EGRSD.
        options: Its options by name.
    """

    preset: str = ""
    mix: float = 1.0
    mix_decay_steps: int = 0
    ratio_clip: float = 0.2
    attenuation: float = 0.3
    gate_floor: float = 0.1
    lookahead: int = 3
    entropy_normalization: Literal["batch_max", "quantile", "sequence_max", "log_vocab"] = "batch_max"
    entropy_floor: float = 1.0
    entropy_quantile: float = 0.95
    advantage: Literal["running", "group", "outcome"] = "running"
    advantage_warmup: int = 10
    advantage_baseline: float = 0.5
    advantage_std: bool = True
    length_bonus: float = 0.5
    loss: Literal["reinforce", "ppo"] = "reinforce"
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float | None = None
    kl_coef: float = 0.0
    loss_normalization: Literal["token_mean", "seq_mean", "fixed"] = "token_mean"
    fixed_length: int = 0
    score_temperature: float | None = None
    function: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("mix", "ratio_clip", "attenuation", "gate_floor"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name} is {value}; it must lie in [0, 1]")
        require(
            self.gate_floor > 0 or self.attenuation < 1,
            "objective.attenuation is 1 and objective.gate_floor 0, so that a token could lose its whole weight; "
            "lower the one or raise the other",
        )
        not_negative = ("lookahead", "mix_decay_steps", "entropy_floor", "advantage_warmup", "length_bonus")
        require_not_negative(self, "objective", *not_negative, "clip_high", "kl_coef")
        require(0 < self.entropy_quantile <= 1, "objective.entropy_quantile must lie in (0, 1]")
        require(0 <= self.clip_low < 1, "objective.clip_low must lie in [0, 1)")
        require(self.importance_cap is None or self.importance_cap > 0, "objective.importance_cap must be positive")
        require(
            self.score_temperature is None or self.score_temperature > 0, "objective.score_temperature must be positive"
        )
        require(
            self.loss_normalization != "fixed" or self.fixed_length > 0,
            'objective.loss_normalization is "fixed", so objective.fixed_length must be positive',
        )
        require(not self.options or bool(self.function), "objective.options are those of objective.function; set it")


@dataclass(frozen=True)
class TeacherConfig:
    """The weights that the teacher scores with.

    Args:
        weights: The student's initial weights (the paper's), its current ones, their exponential moving average, or a
            copy of the current ones that is renewed every `snapshot_every` steps.
        ema_decay: Decay per step of "ema".
        snapshot_every: Steps between two copies of "snapshot".
    """

    weights: Literal["frozen", "live", "ema", "snapshot"] = "frozen"
    ema_decay: float = 0.99
    snapshot_every: int = 10

    def __post_init__(self):
        require(0 <= self.ema_decay < 1, "teacher.ema_decay must lie in [0, 1)")
        require_positive(self, "teacher", "snapshot_every")
