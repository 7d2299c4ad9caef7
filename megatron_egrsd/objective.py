"""EGRSD and CL-EGRSD as pure functions on packed tokens (docs/method.md has the derivation and the sources).

Shapes: T packed tokens, B sequences, R rollouts. `cu_seqlens` [B + 1] int32 bounds the sequences, `mask` [T] bool is
True on response tokens. Log-probabilities and entropies are in nats. Nothing here knows a model or an engine; only
`ObjectiveConfig`'s fields are read, so any object that has them will do.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron_egrsd.config import ObjectiveConfig


def advantages(rewards: torch.Tensor, group_ids: torch.Tensor, config: "ObjectiveConfig") -> torch.Tensor:
    """Direction: the sequence-level signal A_i of each rollout. rewards [R] in [0, 1], group_ids [R] int -> [R] fp32.

    "group": reward minus the mean of its group, divided by the group's sample standard deviation + 1e-6 unless
    `advantage_std` is off (GRPO, arXiv 2402.03300, eq. 3); exactly 0 where all rewards of a group are equal.
    "outcome": +1 where the reward exceeds 0.5, else -1.
    """
    rewards = rewards.float()
    if config.advantage == "outcome":
        return torch.where(rewards > 0.5, 1.0, -1.0)
    result = torch.zeros_like(rewards)
    for group in group_ids.unique():
        member = group_ids == group
        r = rewards[member]
        if r.min() == r.max():
            continue
        centred = r - r.mean()
        result[member] = centred / (r.std() + 1e-6) if config.advantage_std else centred
    return result


@dataclass(frozen=True)
class TokenWeights:
    """W_t = A * magnitude * gate and its parts; each [T] fp32 without gradient, exactly 0 outside the mask."""

    weight: torch.Tensor
    magnitude: torch.Tensor
    gate: torch.Tensor
    normalized_entropy: torch.Tensor


def token_weights(
    advantage: torch.Tensor,
    teacher_log_prob: torch.Tensor,
    student_log_prob: torch.Tensor,
    teacher_entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> TokenWeights:
    """Token weights of the whole batch: direction x magnitude (RLSD) x confidence gate (EGRSD, CL-EGRSD).

    All tensors [T]; `advantage` holds A_i on every token of rollout i. `group` are the data-parallel ranks over which
    the entropy quantile is taken; `vocab_size` is needed for entropy_normalization = "log_vocab" alone.
    """
    gate, normalized = confidence_gate(teacher_entropy, cu_seqlens, mask, config, vocab_size=vocab_size, group=group)
    m = magnitude(advantage, teacher_log_prob, student_log_prob, config) * mask
    return TokenWeights(advantage.float() * m * gate * mask, m, gate * mask, normalized)


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


@torch.no_grad()
def confidence_gate(
    teacher_entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """g_t = 1 - alpha * min_{0 <= k <= K} h_{t+k} and the normalised entropy h itself, both [T] fp32.

    Teacher-entropy gate: EGRSD; the minimum over the lookahead: CL-EGRSD (arXiv 2605.13255). The normalisations of
    `normalized_entropy` are ours, where the paper's public text is silent.
    """
    h = normalized_entropy(teacher_entropy, cu_seqlens, mask, config, vocab_size=vocab_size, group=group)
    return 1 - config.attenuation * lookahead_min(h, cu_seqlens, mask, config.lookahead), h


def normalized_entropy(
    teacher_entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """h_t = H_t / entropy_scale, at most 1, [T] fp32, 0 outside the mask. Ours."""
    entropy = torch.where(mask, teacher_entropy.detach().float(), 0.0)
    scale = entropy_scale(entropy, cu_seqlens, mask, config, vocab_size=vocab_size, group=group)
    tiny = torch.finfo(torch.float32).tiny
    return (entropy / scale.clamp(min=tiny)).clamp(0, 1)


def entropy_scale(
    entropy: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor,
    config: "ObjectiveConfig",
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The entropy, in nats, that counts as h = 1: a scalar, or [T] where sequences differ. entropy [T] fp32. Ours.

    "quantile": the p-quantile over the response tokens of all ranks of `group`, never below the floor.
    "max": the maximum of the sequence, for which `entropy` must be 0 outside the mask. "log_vocab": ln(vocab_size).
    """
    if config.entropy_normalization == "log_vocab":
        if not vocab_size:
            raise ValueError('entropy_normalization = "log_vocab" needs vocab_size')
        return torch.log(torch.tensor(float(vocab_size), device=entropy.device))
    if config.entropy_normalization == "max":
        ids = _sequence_ids(cu_seqlens, entropy.numel())
        peaks = torch.zeros(cu_seqlens.numel() + 1, device=entropy.device)
        return peaks.scatter_reduce_(0, ids, entropy, "amax")[ids]
    quantile = entropy_quantile(entropy[mask], config.entropy_quantile, group=group)
    return quantile.clamp(min=config.entropy_quantile_floor)


def entropy_quantile(entropy: torch.Tensor, quantile: float, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Exact quantile, linearly interpolated, of the values [n] of every rank of `group`; a scalar, 0 where n = 0."""
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


def lookahead_min(h: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor, lookahead: int) -> torch.Tensor:
    """min_{0 <= k <= K} h_{t+k} over the response tokens of the same sequence, [T]; 0 outside the mask."""
    ids = _sequence_ids(cu_seqlens, h.numel())
    visible = torch.where(mask, h, torch.inf)
    result = visible
    for k in range(1, min(lookahead, h.numel() - 1) + 1):
        ahead = torch.where(ids[k:] == ids[:-k], visible[k:], torch.inf)
        result = torch.cat([torch.minimum(result[:-k], ahead), result[-k:]])
    return torch.where(mask, result, 0.0)


def _sequence_ids(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """[T] the number of the sequence each token belongs to."""
    return torch.bucketize(torch.arange(length, device=cu_seqlens.device), cu_seqlens[1:], right=True)


def loss_normalizer(
    response_lengths: torch.Tensor, config: "ObjectiveConfig", *, num_tokens: int, num_sequences: int
) -> torch.Tensor:
    """What each token's term of the loss is divided by, [T] fp32: N of docs/method.md, known before the first pass.

    `response_lengths` [B] of this part of the batch; `num_tokens` and `num_sequences` of the global batch.
    """
    lengths = response_lengths.float()
    per_sequence = {
        "token_mean": torch.full_like(lengths, num_tokens),
        "seq_mean": lengths * num_sequences,
        "fixed": torch.full_like(lengths, config.fixed_length * num_sequences),
    }[config.loss_normalization]
    return per_sequence.repeat_interleave(response_lengths.long())


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` carries the gradient; the rest are detached sums over the mask, for metrics."""

    loss: torch.Tensor
    clipped: torch.Tensor  # tokens whose policy ratio was clipped
    ratio: torch.Tensor  # pi_theta / pi_old
    importance: torch.Tensor  # truncated pi_old / pi_rollout; the token count where that is off
    kl: torch.Tensor  # estimates of the KL divergence to the reference, nats; 0 where that is off
    tokens: torch.Tensor


def policy_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    normalizer: torch.Tensor | float,
    config: "ObjectiveConfig",
    *,
    rollout_log_prob: torch.Tensor | None = None,
    reference_log_prob: torch.Tensor | None = None,
) -> PolicyLoss:
    """L = -sum_t mask * c * min(rho W, clip(rho, 1 - eps_lo, 1 + eps_hi) W) / N with W detached. All [T].

    rho = pi_theta / pi_old (PPO, arXiv 1707.06347, eq. 7); c = min(pi_old / pi_rollout, C) where `importance_cap` is
    set (truncated importance sampling; needs `rollout_log_prob`), else 1. Tokens outside the mask contribute exactly
    0 to loss and gradient, whatever their values.

    Where `kl_coef` is positive (it needs `reference_log_prob`), plus kl_coef * sum_t mask * (e^d - d - 1) / N with
    d = log pi_ref - log pi_theta: GRPO's estimate of KL(pi_theta | pi_ref) (arXiv 2402.03300, eq. 4), never negative.
    """
    log_prob, old = torch.where(mask, log_prob.float(), 0.0), torch.where(mask, old_log_prob.detach().float(), 0.0)
    w = torch.where(mask, weight.detach().float(), 0.0)
    ratio = torch.exp(log_prob - old)
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * w, clipped_ratio * w)
    importance = mask.float()
    if config.importance_cap is not None:
        if rollout_log_prob is None:
            raise ValueError("importance_cap is set, so policy_loss needs rollout_log_prob")
        drift = torch.where(mask, old - rollout_log_prob.detach().float(), 0.0)
        importance = importance * torch.exp(drift).clamp(max=config.importance_cap)
    normalizer = torch.as_tensor(normalizer, dtype=torch.float32, device=w.device)
    loss, kl = -torch.where(mask, importance * surrogate / normalizer, 0.0).sum(), torch.zeros_like(log_prob)
    if config.kl_coef:
        if reference_log_prob is None:
            raise ValueError("kl_coef is set, so policy_loss needs reference_log_prob")
        beyond = torch.where(mask, reference_log_prob.detach().float(), 0.0) - log_prob
        kl = torch.expm1(beyond) - beyond
        loss = loss + config.kl_coef * torch.where(mask, kl / normalizer, 0.0).sum()
    was_clipped = (clipped_ratio * w < ratio * w) & mask
    return PolicyLoss(
        loss, was_clipped.sum(), (ratio.detach() * mask).sum(), importance.sum(), kl.detach().sum(), mask.sum()
    )
