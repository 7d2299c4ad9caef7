"""Distillation of a teacher's whole distributions at the student's own tokens, without a reward (OPSD, CRISP)."""

from dataclasses import dataclass

import torch

from megatron_egrsd.objectives.interface import Objective
from megatron_egrsd.vocab_parallel import DivergenceForm


@dataclass(frozen=True)
class Distillation(Objective):
    """L = sum_t D(p_T, p_S)_t / N, D over the full vocabulary at every token of every rollout.

    With forward_kl, `entry_clip` 0.05 and a frozen teacher that reads the solution it is OPSD (arXiv 2601.18734; the
    clip is that of its authors' code). With reverse_kl and copies of the student that are asked to be concise it is
    CRISP (arXiv 2603.05433, eq. 1). presets.py has both.

    Args:
        kind: forward_kl, KL(p_T, p_S); reverse_kl, KL(p_S, p_T); or jsd.
        entry_clip: Most nats that one entry of the vocabulary adds to a token's divergence; null does not limit them.
        beta: Weight of the teacher in the mixture of jsd.
        top_k: Compare the student's likeliest tokens, and the rest as one; null compares all.
    """

    kind: str = "forward_kl"
    entry_clip: float | None = None
    beta: float = 0.5
    top_k: int | None = None

    def __post_init__(self):
        _ = self.divergence  # refuses a bad option

    @property
    def divergence(self) -> DivergenceForm:  # type: ignore[override]
        return DivergenceForm(self.kind, self.entry_clip, self.beta, self.top_k)

    def advantages(self, rewards, group_ids):
        return torch.ones_like(rewards)  # every rollout is trained
