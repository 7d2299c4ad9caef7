"""Controls and ablations of the validation study: the family with another gate (docs/guides/extending.md explains how).

megatron-egrsd train --config examples/validation/study.yaml \
    --objective.function examples/validation/objectives.py:ShuffledGate --objective.lookahead 0
"""

from dataclasses import dataclass

import torch

from megatron_egrsd.objectives.egrsd import EGRSD


@dataclass(frozen=True)
class ShuffledGate(EGRSD):
    """The control: the same gate values, assigned to the batch's tokens at random.

    An effect that remains comes from smaller weights, not from the positions at which the teacher is uncertain.
    """

    def prepare(self, tokens, *, vocab_size, group=None):
        gate = super().prepare(tokens, vocab_size=vocab_size, group=group)["gate"]
        seed = int(1e6 * tokens.teacher_entropy.double().sum())  # of the batch: equal arguments, equal result
        order = torch.randperm(gate.numel(), generator=torch.Generator().manual_seed(seed))
        return {"gate": gate[order.to(gate.device)]}


@dataclass(frozen=True)
class LookaheadMean(EGRSD):
    """The mean of the entropy over the lookahead; CL-EGRSD takes the minimum instead."""

    def prepare(self, tokens, *, vocab_size, group=None):
        h = super().prepare(tokens, vocab_size=vocab_size, group=group)["normalized_entropy"]
        steps = torch.arange(h.numel(), device=h.device)
        end = tokens.cu_seqlens[1:].repeat_interleave(tokens.cu_seqlens.diff())
        stop = torch.minimum(steps + self.config.lookahead + 1, end.to(steps))
        sums = torch.cat([h.new_zeros(1, dtype=torch.float64), h.double().cumsum(0)])
        return {"gate": (1 - self.config.attenuation * (sums[stop] - sums[steps]) / (stop - steps)).float()}
