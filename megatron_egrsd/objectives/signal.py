"""Give each rollout of a batch its direction: the sequence-level signal A_i."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_egrsd.config import ObjectiveConfig
    from megatron_egrsd.data.samples import Rollout
    from megatron_egrsd.objectives.interface import Objective


def advantages(rewards: torch.Tensor, group_ids: torch.Tensor, config: "ObjectiveConfig") -> torch.Tensor:
    """Direction: the sequence-level signal A_i of each rollout. rewards [R] in [0, 1], group_ids [R] int -> [R] fp32.

    "group": reward minus the mean of its group, divided by the group's sample standard deviation + 1e-6 unless
    `advantage_std` is off (GRPO, arXiv 2402.03300, eq. 3); exactly 0 where all rewards of a group are equal.
    "outcome": +1 where the reward exceeds 0.5, else -1.
    """
    rewards = rewards.float()
    if config.advantage == "outcome":
        return torch.where(rewards > 0.5, 1.0, -1.0)
    result = torch.zeros_like(rewards)
    for group in group_ids.unique():
        member = group_ids == group
        r = rewards[member]
        if r.min() == r.max():
            continue
        centred = r - r.mean()
        result[member] = centred / (r.std() + 1e-6) if config.advantage_std else centred
    return result


def rollout_advantages(rollouts: "list[Rollout]", objective: "Objective") -> list[float]:
    """Return the signal that `objective` gives each rollout of a batch."""
    rewards = torch.tensor([r.reward for r in rollouts])
    return objective.advantages(rewards, torch.tensor([r.group for r in rollouts])).tolist()
