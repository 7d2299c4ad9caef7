"""EGRSD and CL-EGRSD: direction x magnitude x confidence gate (derivation and sources: docs/reference/method.md).

Shapes: T response tokens of B rollouts, end to end; `cu_seqlens` [B + 1] int32 bounds the rollouts. Log-probs and
entropies are in nats. Nothing here knows a model or an engine; of a configuration only the fields of `ObjectiveConfig`
are read, so any object that has them will do.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_egrsd.objectives.interface import Objective

if TYPE_CHECKING:
    from megatron_egrsd.config import ObjectiveConfig


class EGRSD(Objective):
    """W = direction x magnitude x gate. Lookahead > 0 is CL-EGRSD; without a gate RLSD; without a ratio too, GRPO."""

    @property
    def needs_teacher(self) -> bool:
        return self.config.mix > 0 or self.config.attenuation > 0

    def prepare(self, tokens, *, vocab_size, group=None):
        if not self.needs_teacher:
            return {}
        found = confidence(tokens.teacher_entropy, tokens.cu_seqlens, self.config, vocab_size=vocab_size, group=group)
        return vars(found)

    def weight(self, tokens):
        if not self.needs_teacher:
            return tokens.advantage
        args = tokens.advantage, tokens.teacher_log_prob, tokens.student_log_prob
        return tokens.advantage * magnitude(*args, self.config) * tokens.fields["gate"]

    def metrics(self, tokens):
        if not self.needs_teacher:
            return {}
        gate = tokens.fields["gate"]
        ratio = torch.exp(torch.sign(tokens.advantage) * (tokens.teacher_log_prob - tokens.student_log_prob))
        return {
            "gate/mean": gate,
            "gate/closed_share": gate < 1 - self.config.attenuation / 2,
            "weight/clip_share": (ratio - 1).abs() > self.config.ratio_clip,
        }


@torch.no_grad()
def magnitude(
    advantage: torch.Tensor, teacher_log_prob: torch.Tensor, student_log_prob: torch.Tensor, config: "ObjectiveConfig"
) -> torch.Tensor:
    """m_t = (1 - lam) + lam * clip(w_t, 1 - eps_w, 1 + eps_w), w_t = exp(sign(A) * (log pi_T - log pi_S)), [T] fp32.

    The log-ratio is detached and can shrink or grow a weight but never flip it (RLSD, arXiv 2604.03128).
    """
    log_ratio = teacher_log_prob.detach().float() - student_log_prob.detach().float()
    ratio = torch.exp(torch.sign(advantage.float()) * log_ratio)
    return (1 - config.mix) + config.mix * ratio.clamp(1 - config.ratio_clip, 1 + config.ratio_clip)


@dataclass(frozen=True)
class Confidence:
    """The confidence gate and the numbers behind it; each [T] fp32 without gradient."""

    gate: torch.Tensor  # g
    normalized_entropy: torch.Tensor  # h, in [0, 1]
    lookahead_entropy: torch.Tensor  # the minimum of h over the lookahead
    entropy_scale: torch.Tensor  # nats that count as h = 1


@torch.no_grad()
def confidence(
    teacher_entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Confidence:
    """g_t = 1 - alpha * min_{0 <= k <= K} h_{t+k}, h_t = H_t / scale, at most 1.

    Teacher-entropy gate: EGRSD; the minimum over the lookahead: CL-EGRSD (arXiv 2605.13255). The scales are ours.

    Args:
        vocab_size: Needed for entropy_normalization = "log_vocab" alone.
        group: The data-parallel ranks over which the quantile is taken; None means that these tokens are all.
    """
    entropy = teacher_entropy.detach().float()
    scale = entropy_scale(entropy, cu_seqlens, config, vocab_size=vocab_size, group=group)
    h = (entropy / scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    ahead = lookahead_min(h, cu_seqlens, config.lookahead)
    return Confidence(1 - config.attenuation * ahead, h, ahead, scale.expand(h.shape))


def entropy_scale(
    entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The entropy, in nats, that counts as h = 1: a scalar, or [T] if sequences differ. entropy [T] fp32. Ours.

    "quantile": the p-quantile over the response tokens of all ranks of `group`, never below the floor.
    "max": the maximum of the sequence. "log_vocab": ln(vocab_size).
    """
    if config.entropy_normalization == "log_vocab":
        if not vocab_size:
            raise ValueError('entropy_normalization = "log_vocab" needs vocab_size')
        return torch.log(torch.tensor(float(vocab_size), device=entropy.device))
    if config.entropy_normalization == "max":
        ids = _sequence_ids(cu_seqlens, entropy.numel())
        peaks = torch.zeros(cu_seqlens.numel() + 1, device=entropy.device)
        return peaks.scatter_reduce_(0, ids, entropy, "amax")[ids]
    return entropy_quantile(entropy, config.entropy_quantile, group=group).clamp(min=config.entropy_quantile_floor)


def entropy_quantile(entropy: torch.Tensor, quantile: float, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Exact quantile, linearly interpolated, of the values [n] of every rank of `group`; a scalar, 0 if n = 0."""
    if group is not None and group.size() > 1:
        count = torch.tensor([entropy.numel()], device=entropy.device)
        counts = [torch.zeros_like(count) for _ in range(group.size())]
        dist.all_gather(counts, count, group=group)
        longest = int(max(counts))
        padded = torch.nn.functional.pad(entropy, (0, longest - entropy.numel()))
        gathered = [torch.empty_like(padded) for _ in range(group.size())]
        dist.all_gather(gathered, padded, group=group)
        entropy = torch.cat([g[: int(n)] for g, n in zip(gathered, counts, strict=True)])
    if not entropy.numel():
        return entropy.new_zeros(())
    # torch.quantile stops at 16M elements; sorting does not.
    ordered = entropy.sort().values
    position = quantile * (entropy.numel() - 1)
    below = int(position)
    above = min(below + 1, entropy.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def lookahead_min(h: torch.Tensor, cu_seqlens: torch.Tensor, lookahead: int) -> torch.Tensor:
    """min_{0 <= k <= K} h_{t+k} over the tokens of the same sequence, [T]."""
    ids, result = _sequence_ids(cu_seqlens, h.numel()), h
    for k in range(1, min(lookahead, h.numel() - 1) + 1):
        ahead = torch.where(ids[k:] == ids[:-k], h[k:], torch.inf)
        result = torch.cat([torch.minimum(result[:-k], ahead), result[-k:]])
    return result


def _sequence_ids(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """[T] the number of the sequence each token belongs to."""
    return torch.bucketize(torch.arange(length, device=cu_seqlens.device), cu_seqlens[1:], right=True)
