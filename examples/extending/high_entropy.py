"""GRPO on only the tokens with the highest student entropy (Wang et al., arXiv 2506.01939). It needs no teacher.

megatron-egrsd train --config examples/configs/tiny_cpu.yaml --objective.preset grpo --rollout.prompts_per_step 16 \
    --objective.function examples/extending/high_entropy.py:HighEntropy --objective.options.share 0.2
"""

from dataclasses import dataclass

from megatron_egrsd.objectives import Objective
from megatron_egrsd.objectives.egrsd import entropy_quantile


@dataclass(frozen=True)
class HighEntropy(Objective):
    """W_t = A if the student's entropy is among the highest of the batch, else 0.

    Args:
        share: Share of the batch's tokens that is trained, in (0, 1].
    """

    share: float = 0.2

    needs_teacher = False
    needs_student = True

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must lie in (0, 1]")

    def prepare(self, tokens, *, vocab_size, group=None):
        threshold = entropy_quantile(tokens.student_entropy, 1 - self.share, group=group)
        return {"gate": (tokens.student_entropy >= threshold).float()}

    def weight(self, tokens):
        return tokens.advantage * tokens.fields["gate"]

    def metrics(self, tokens):
        return {"gate/mean": tokens.fields["gate"]}
