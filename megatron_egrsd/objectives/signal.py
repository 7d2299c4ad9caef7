"""Give each rollout of a batch its direction: from the verifiable reward to the sequence-level signal A_i."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_egrsd.config import ObjectiveConfig
    from megatron_egrsd.data.samples import Rollout

_STD_FLOOR = 1e-6  # added to every standard deviation that a reward is divided by (ours; the paper names none)


@dataclass(frozen=True)
class History:
    """The number of earlier steps, Welford's statistics of all their shaped rewards, and the objective's own notes.

    Python floats, so fp64; equal on every rank, because every rank sees all rollouts of a batch in the same order.
    """

    steps: int = 0
    count: int = 0  # rewards
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean
    notes: dict[str, float] = field(default_factory=dict)  # what `Objective.remember` returned, by name

    @property
    def std(self) -> float:
        """The sample standard deviation (n - 1), 0 for fewer than two rewards."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def after(self, rewards: Iterable[float], notes: dict[str, float] | None = None) -> "History":
        """Return the history one step later, with the rewards and new notes of that step.

        The statistics are B. P. Welford's (Technometrics 4 (1962)).
        """
        count, mean, squares = self.count, self.mean, self.squares
        for reward in rewards:
            count += 1
            difference = reward - mean
            mean += difference / count
            squares += difference * (reward - mean)
        return History(self.steps + 1, count, mean, squares, self.notes | (notes or {}))


def shaped_rewards(rollouts: "list[Rollout]", config: "ObjectiveConfig", max_response_tokens: int) -> list[float]:
    """Return r_i = reward * (1 + beta_L (1 - T_i / L_max)) if a response is right (reward > 0.5), else the reward.

    EGRSD (arXiv 2605.13255, section 3 and appendix D), for rewards of 0 and 1. T_i counts the end-of-turn token; L_max
    is `max_response_tokens`.
    """
    return [
        r.reward * (1 + config.length_bonus * (1 - len(r.response_ids) / max_response_tokens)) if r.right else r.reward
        for r in rollouts
    ]


def advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, config: "ObjectiveConfig", history: History
) -> torch.Tensor:
    """Return A_i of each rollout, [R] fp32, from shaped rewards [R] and group_ids [R] int (one group a prompt).

    "running": (r - mean) / (std + 1e-6) over all rewards of earlier steps, exactly 0 for a reward that is the mean;
    r - `advantage_baseline` in the first `advantage_warmup` steps (EGRSD, arXiv 2605.13255, eq. 9 and appendix B;
    sample deviation and 1e-6 are ours).
    "group": reward minus the mean of its group, divided by the group's sample standard deviation + 1e-6 unless
    `advantage_std` is off (GRPO, arXiv 2402.03300, eq. 3); exactly 0 if all rewards of a group are equal.
    "outcome": +1 if the reward exceeds 0.5, else -1 (ours).
    """
    rewards = rewards.float()
    if config.advantage == "running":
        if history.steps < config.advantage_warmup:
            return rewards - config.advantage_baseline
        beyond = (rewards.double() - history.mean).masked_fill(rewards == history.mean, 0.0)  # equal in fp32
        return (beyond / (history.std + _STD_FLOOR)).float()
    if config.advantage == "outcome":
        return torch.where(rewards > 0.5, 1.0, -1.0)
    result = torch.zeros_like(rewards)
    for group in group_ids.unique():
        member = group_ids == group
        r = rewards[member]
        if r.min() == r.max():
            continue
        centred = r - r.mean()
        result[member] = centred / (r.std() + _STD_FLOOR) if config.advantage_std else centred
    return result
