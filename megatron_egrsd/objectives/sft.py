"""Supervised fine-tuning: the likelihood of the data set's reference solutions, without rollouts or a teacher."""

from dataclasses import dataclass

import torch

from megatron_egrsd.objectives.interface import Objective


@dataclass(frozen=True)
class SFT(Objective):
    """L = -(1/N) sum_t log p(y_t), y the tokens of the solutions of an update, N their number.

    The baseline of EGRSD (arXiv 2605.13255, section 5).
    """

    needs_teacher = False
    needs_rollouts = False

    def advantages(self, rewards, group_ids):
        return torch.ones_like(rewards)  # every solution is trained

    def weight(self, tokens):
        return torch.ones_like(tokens.advantage)
