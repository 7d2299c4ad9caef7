"""AntiSD: GRPO, and an ascent of the divergence from the teacher at every token while the teacher is unsure enough."""

import math
from dataclasses import dataclass

import torch

from megatron_egrsd.objectives.egrsd import entropy_quantile
from megatron_egrsd.objectives.interface import Objective


@dataclass(frozen=True)
class AntiSD(Objective):
    """W = A - lambda g phi(u), phi(u) = (softplus(u) - ln 2) / 2, u = log p_T(y) - log p_S(y).

    -phi is the derivative of JSD(p_S, p_T): tokens that the solution makes likelier lose weight, and others gain at
    most lambda ln(2) / 2. The gate g is 0 during the first `warmup` steps and while the teacher has collapsed: it
    closes if the median H of the teacher's entropies in the batch falls below `collapse` x H_warm, and opens again at
    H_warm (arXiv 2605.11609, eq. 6 and 7, algorithm 1 and table 5; its authors' code could not be read). H_warm is the
    mean of H over the warm-up, and the gate is open after it (ours; the paper says neither). Rollouts of advantage 0
    are trained as well.

    Args:
        strength: lambda; 0 is GRPO.
        warmup: Steps that calibrate the gate; 0 leaves it open for good.
        collapse: Share of H_warm below which the gate closes.
    """

    strength: float = 0.5
    warmup: int = 5
    collapse: float = 0.93

    trains_all = True

    def __post_init__(self):
        if self.strength < 0 or self.warmup < 0:
            raise ValueError("strength and warmup must not be negative")
        if not 0 < self.collapse <= 1:
            raise ValueError(f"collapse is {self.collapse}; it must lie in (0, 1]")

    def without_context(self, signal):
        return signal  # the teacher reads what the student reads, and u is 0

    def prepare(self, tokens, *, vocab_size, group=None):
        entropy = entropy_quantile(tokens.teacher_entropy, 0.5, group=group)  # H, in nats
        gate = torch.full_like(tokens.advantage, self._gate(entropy.item()))
        return {"gate": gate, "median_entropy": entropy.expand_as(gate)}

    def remember(self, tokens, *, group=None):
        entropy, notes = tokens.fields["median_entropy"][0].item(), self.history.notes
        done, warm = notes.get("warmed", 0.0), notes.get("warm", 0.0)
        if done < self.warmup:
            return {"warmed": done + 1, "warm": warm + (entropy - warm) / (done + 1)}
        return {"gate": self._gate(entropy)}

    def weight(self, tokens):
        return tokens.advantage - self._ascent(tokens)

    def metrics(self, tokens):
        return {"gate/mean": tokens.fields["gate"], "antisd/abs_mean": self._ascent(tokens).abs()}

    def _ascent(self, tokens):
        """Return lambda g phi(u), [T]."""
        u = tokens.teacher_log_prob - tokens.student_log_prob
        phi = (torch.nn.functional.softplus(u) - math.log(2)) / 2
        return self.strength * tokens.fields["gate"] * phi

    def _gate(self, entropy: float) -> float:
        """Return g of this step, from the median entropy of its batch and from earlier steps."""
        notes = self.history.notes
        warm = notes.get("warm", 0.0)
        if notes.get("warmed", 0.0) < self.warmup:
            return 0.0
        if entropy >= warm:
            return 1.0
        return 0.0 if entropy < self.collapse * warm else notes.get("gate", 1.0)
