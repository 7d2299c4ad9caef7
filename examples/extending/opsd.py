"""OPSD: on-policy self-distillation without a reward (Zhao et al., arXiv 2601.18734), the sampled-token form.

megatron-egrsd train --config examples/configs/tiny_cpu.yaml --objective.function examples/extending/opsd.py:OPSD
"""

from dataclasses import dataclass

import torch

from megatron_egrsd.objectives import Objective


@dataclass(frozen=True)
class OPSD(Objective):
    """W_t = log pi_T(y_t) - log pi_S(y_t), clipped: the policy gradient of KL(pi_S || pi_T) at each token.

    Args:
        clip: Largest |W_t|, in nats, so that a few style tokens do not decide the update.
    """

    clip: float = 5.0

    def __post_init__(self):
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be positive")

    def advantages(self, rewards, group_ids):
        return torch.ones_like(rewards)  # no reward: every rollout is trained

    def weight(self, tokens):
        return self._log_ratio(tokens).clamp(-self.clip, self.clip)

    def metrics(self, tokens):
        return {"opsd/clip_share": self._log_ratio(tokens).abs() > self.clip}

    def _log_ratio(self, tokens):
        return tokens.teacher_log_prob - tokens.student_log_prob
