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
    """W = direction x magnitude x gate (EGRSD, arXiv 2605.13255, eq. 7 with eq. 2, 6 and 8).

    A lookahead above 0 is CL-EGRSD; attenuation 0 leaves the gate out, mix 0 the magnitude (presets.py names these).
    """

    @property
    def needs_teacher(self) -> bool:
        return self.config.mix > 0 or self.config.attenuation > 0

    @property
    def mix(self) -> float:
        """lam of this step: `mix`, falling linearly to 0 over `mix_decay_steps` if that is set (RLSD)."""
        steps = self.config.mix_decay_steps
        return self.config.mix * (1 - min(self.history.steps / steps, 1)) if steps else self.config.mix

    def ratio(self, tokens):
        """Return exp(D delta) of each token, [T]."""
        return evidence_ratio(tokens.advantage, tokens.teacher_log_prob, tokens.student_log_prob)

    def magnitude(self, tokens):
        """Return w of each token, [T], with the `mix` of this step."""
        return magnitude(self.ratio(tokens), self.mix, self.config.ratio_clip)

    def prepare(self, tokens, *, vocab_size, group=None):
        if not self.needs_teacher:
            return {}
        found = confidence(tokens.teacher_entropy, tokens.cu_seqlens, self.config, vocab_size=vocab_size, group=group)
        return vars(found)

    def weight(self, tokens):
        if not self.needs_teacher:
            return tokens.advantage
        return tokens.advantage * self.magnitude(tokens) * tokens.fields["gate"]

    def metrics(self, tokens):
        if not self.needs_teacher:
            return {}
        gate = tokens.fields["gate"]
        return {
            "gate/mean": gate,
            "gate/closed_share": gate < 1 - self.config.attenuation / 2,
            "weight/clip_share": (self.ratio(tokens) - 1).abs() > self.config.ratio_clip,
        }


@torch.no_grad()
def evidence_ratio(
    advantage: torch.Tensor, teacher_log_prob: torch.Tensor, student_log_prob: torch.Tensor
) -> torch.Tensor:
    """Return exp(D delta), D = sign(A), delta = log p_T(y) - log p_S(y); [T] fp32 (arXiv 2605.13255, section 3)."""
    delta = teacher_log_prob.detach().float() - student_log_prob.detach().float()
    return torch.exp(torch.sign(advantage.float()) * delta)


def magnitude(ratio: torch.Tensor, mix: float, ratio_clip: float) -> torch.Tensor:
    """Return w = clip(ratio, 1 - eps, 1 + eps) if mix is 1 (arXiv 2605.13255, eq. 2), else (1 - mix) + mix w.

    The mixture is RLSD's (arXiv 2604.03128). The result can shrink or grow a weight but never flip it.
    """
    clipped = ratio.clamp(1 - ratio_clip, 1 + ratio_clip)
    return clipped if mix == 1 else (1 - mix) + mix * clipped


@dataclass(frozen=True)
class Confidence:
    """The confidence gate omega and the numbers behind it; each [T] fp32 without gradient."""

    gate: torch.Tensor  # omega
    normalized_entropy: torch.Tensor  # Hhat, in [0, 1]
    lookahead_entropy: torch.Tensor  # Hhat^CL: the minimum of Hhat over the lookahead
    entropy_scale: torch.Tensor  # nats that count as Hhat = 1


@torch.no_grad()
def confidence(
    teacher_entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Confidence:
    """Return omega_t = clip(1 - gamma Hhat^CL_t, floor, 1), Hhat^CL_t = min over j in t .. t + W of H_j / scale.

    EGRSD (W = 0) and CL-EGRSD (arXiv 2605.13255, eq. 5, 6 and 8). Of eq. 8 and Algorithm 1, which differ, eq. 8: the
    scale is that of the raw entropies, so that the minimum commutes with the division.

    Args:
        vocab_size: Needed for entropy_normalization = "log_vocab" alone.
        group: The data-parallel ranks over which maximum or quantile are taken; None means that these tokens are all.
    """
    entropy = teacher_entropy.detach().float()
    scale = entropy_scale(entropy, cu_seqlens, config, vocab_size=vocab_size, group=group)
    h = (entropy / scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    ahead = lookahead_min(h, cu_seqlens, config.lookahead)
    gate = (1 - config.attenuation * ahead).clamp(config.gate_floor, 1)
    return Confidence(gate, h, ahead, scale.expand(h.shape))


def entropy_scale(
    entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the entropy, in nats, that counts as Hhat = 1: a scalar, or [T] if sequences differ. entropy [T] fp32.

    "batch_max": the maximum over the response tokens of all ranks of `group`, at least `entropy_floor` (arXiv
    2605.13255, eq. 5; the whole batch is our reading of "minibatch"). Ours: "quantile": their p-quantile, with the same
    floor; "sequence_max": the maximum of the sequence; "log_vocab": ln(vocab_size).
    """
    if config.entropy_normalization == "log_vocab":
        if not vocab_size:
            raise ValueError('entropy_normalization = "log_vocab" needs vocab_size')
        return torch.log(torch.tensor(float(vocab_size), device=entropy.device))
    if config.entropy_normalization == "sequence_max":
        ids = _sequence_ids(cu_seqlens, entropy.numel())
        peaks = torch.zeros(cu_seqlens.numel() - 1, device=entropy.device)
        return peaks.scatter_reduce_(0, ids, entropy, "amax")[ids]
    if config.entropy_normalization == "quantile":
        scale = entropy_quantile(entropy, config.entropy_quantile, group=group)
    else:
        scale = entropy.max() if entropy.numel() else entropy.new_zeros(())
        if group is not None and group.size() > 1:
            dist.all_reduce(scale, op=dist.ReduceOp.MAX, group=group)
    return scale.clamp(min=config.entropy_floor)


def entropy_quantile(entropy: torch.Tensor, quantile: float, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the exact quantile, linearly interpolated, of all values [n] of `group`'s ranks: a scalar, 0 if n = 0."""
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
    """Return min_{0 <= k <= K} h_{t+k} over the tokens of the same sequence, [T]."""
    ids, result = _sequence_ids(cu_seqlens, h.numel()), h
    for k in range(1, min(lookahead, h.numel() - 1) + 1):
        ahead = torch.where(ids[k:] == ids[:-k], h[k:], torch.inf)
        result = torch.cat([torch.minimum(result[:-k], ahead), result[-k:]])
    return result


def _sequence_ids(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Return the number of the sequence that each token belongs to, [T]."""
    return torch.bucketize(torch.arange(length, device=cu_seqlens.device), cu_seqlens[1:], right=True)
