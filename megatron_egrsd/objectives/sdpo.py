"""SDPO and SRPO: distillation from a teacher that reads a right rollout of the same prompt."""

from dataclasses import dataclass

import torch

from megatron_egrsd.objectives import signal
from megatron_egrsd.objectives.distillation import Distillation
from megatron_egrsd.objectives.means import totals


@dataclass(frozen=True)
class SDPO(Distillation):
    """L = mean of c_t D(p_T, p_S)_t over the tokens of the rollouts whose teacher reads a right sibling.

    D is the JSD over the student's `top_k` likeliest tokens and the rest as one (arXiv 2601.20802; the form and the
    defaults are those of its authors' code). The mean is over the batch (ours with several updates a batch).
    """

    kind: str = "jsd"
    top_k: int | None = 100

    needs_token_mean = True

    def prepare(self, tokens, *, vocab_size, group=None):
        trained = tokens.advantage != 0
        every, count = totals(torch.ones_like(trained), trained, group=group)
        return {"scale": trained * (every / count.clamp(min=1)).float()}

    def divergence_weight(self, tokens):
        return tokens.fields["scale"]


@dataclass(frozen=True)
class SRPO(SDPO):
    """L = (1/N) sum over right rollouts of the GRPO loss + (1/N) sum over wrong ones of c_t w_t D(p_T, p_S)_t.

    w_t = exp(-focus H_t), H the teacher's entropy, divided by its mean over the wrong rollouts' tokens (arXiv
    2604.02288, section 3). A rollout is right if its group advantage is positive. A wrong one whose teacher has no
    right sibling to read is not trained: in a group without a right rollout no advantage is left for it either.

    Args:
        focus: How much less a token weighs for each nat of the teacher's entropy; 0 weighs all alike (beta).
    """

    focus: float = 1.0

    needs_token_mean = False

    def __post_init__(self):
        super().__post_init__()
        if self.focus < 0:
            raise ValueError(f"focus is {self.focus}; it must not be negative")

    def advantages(self, rewards, group_ids):
        return signal.advantages(rewards, group_ids, self.config, self.history)

    def without_context(self, signal):
        return signal.clamp(min=0)  # right ones need no teacher

    def prepare(self, tokens, *, vocab_size, group=None):
        wrong = tokens.advantage < 0
        weight = wrong * torch.exp(-self.focus * tokens.teacher_entropy)
        total, count = totals(weight, wrong, group=group)
        return {"scale": weight * (count / total.clamp(min=torch.finfo(torch.float32).tiny)).float()}

    def weight(self, tokens):
        return tokens.advantage.clamp(min=0)

    def metrics(self, tokens):
        return {"srpo/distilled_share": tokens.advantage < 0}
