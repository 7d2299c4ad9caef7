"""RLCSD: GRPO whose advantages a contrast of teachers changes, one that reads a right rollout and others wrong ones."""

from dataclasses import dataclass

import torch

from megatron_egrsd.objectives.interface import Objective, Tokens
from megatron_egrsd.objectives.means import totals


@dataclass(frozen=True)
class RLCSD(Objective):
    """L = mean policy loss of A over the unselected tokens + selected_weight x that of A' over the selected ones.

    The contrast of a token is e = log p_T(y | right) - log (1/K) sum_k p_T(y | wrong_k); s = strength tanh(e / tau).
    A token is selected if |s| > threshold, and then weighs A' = A + s, but 0 if that has another sign than A: the
    verifier decides the direction (arXiv 2606.11709; the loss and the defaults are those of its authors' code).
    The two means are over the trained tokens of the batch (ours with several updates a batch or micro-batches).

    Args:
        tau: Contrast, in nats, at which |s| is 76 % of `strength` (tanh 1).
        strength: Most that the contrast adds to an advantage (beta x lambda).
        threshold: Smallest |s| that changes a token's advantage (delta).
        selected_weight: Weight of the mean over the selected tokens (eta).
    """

    tau: float = 0.02
    strength: float = 0.5
    threshold: float = 0.02
    selected_weight: float = 1.0

    needs_contexts = True
    needs_token_mean = True

    def __post_init__(self):
        if not self.tau > 0:
            raise ValueError(f"tau is {self.tau}; it must be positive")
        if min(self.strength, self.threshold, self.selected_weight) < 0:
            raise ValueError("strength, threshold and selected_weight must not be negative")

    def prepare(self, tokens, *, vocab_size, group=None):
        contrast = _contrast(tokens)
        step = self.strength * torch.tanh(contrast / self.tau)
        selected = step.abs() > self.threshold
        trained = tokens.advantage != 0
        sums = totals(torch.ones_like(trained), trained & ~selected, trained & selected, group=group)
        every, unchanged, changed = sums  # `normalizer` divides by the batch's tokens, a mean by its own
        scale = torch.where(
            selected, self.selected_weight * every / changed.clamp(min=1), every / unchanged.clamp(min=1)
        )
        return {"contrast": contrast, "step": torch.where(selected, step, 0.0), "scale": scale}

    def weight(self, tokens):
        advantage, moved = tokens.advantage, tokens.advantage + tokens.fields["step"]
        kept = torch.where(advantage > 0, moved.clamp(min=0), moved.clamp(max=0))
        return torch.where(advantage == 0, 0.0, kept) * tokens.fields["scale"]

    def metrics(self, tokens):
        return {
            "contrast/selected_share": tokens.fields["step"] != 0,
            "contrast/abs_mean": tokens.fields["contrast"].abs(),
        }


def _contrast(tokens: Tokens) -> torch.Tensor:
    """Return e of every token, [T] fp32, in nats; 0 for a rollout without contexts, which is not trained."""
    wrong = tokens.context_log_prob
    there = ~wrong.isnan()
    mixture = wrong.nan_to_num(nan=-torch.inf).logsumexp(0) - there.sum(0).clamp(min=1).log()
    return torch.where(there.any(0), tokens.teacher_log_prob - mixture, 0.0)
