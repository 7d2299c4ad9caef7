"""The row kernels in plain torch: the fallback for the compiled ones. Same contract, several times slower.

Statistics of a row x over one part of the vocabulary (a shard, a chunk), with y_j = x_j log2(e) / temperature. The sums
leave out the target's own column:

    reference  an integer c near max(y); -inf if the part holds no finite logit
    rest       R = sum_j 2^(y_j - c)
    weighted   S = sum_j 2^(y_j - c) (y_j - c) ln 2
    target     d = (y_target - c) ln 2; -inf if the part does not hold the target

With A = R + e^d: log p(target) = d - ln A and H = ln A - (S + d e^d) / A. c is an integer, so moving to another
reference scales R and S exactly. H does not cancel for offset logits, as lse - sum(p x) does. With the target left
out of R, 1 - p(target) = R / A stays accurate when the target is nearly certain. `csrc/common/statistics.h` is the
C++ counterpart.

An inverse temperature is a number, or one per row: [N] fp64. Without a target (None), d is -inf.
"""

import math
from typing import TypeAlias

import torch

from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX, NO_TARGET

Scale: TypeAlias = float | torch.Tensor
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
_BLOCK_ELEMENTS = 1 << 22  # rows are taken in blocks of about this many logits: temporaries stay below 100 MB


def _row_blocks(logits_NV: torch.Tensor) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // logits_NV.shape[1])
    return [slice(first, first + step) for first in range(0, logits_NV.shape[0], step)]


def _of_rows(scale: Scale, rows: slice) -> Scale:
    return scale[rows] if isinstance(scale, torch.Tensor) else scale


def _fp32_column(scale: Scale) -> Scale:
    return scale[:, None].float() if isinstance(scale, torch.Tensor) else scale


def _given(target_N: torch.Tensor | None, logits_NV: torch.Tensor) -> torch.Tensor:
    if target_N is not None:
        return target_N
    return torch.full((logits_NV.shape[0],), NO_TARGET, dtype=torch.int64, device=logits_NV.device)


def statistics(
    logits_NV: torch.Tensor, target_N: torch.Tensor | None, vocab_start: int, valid: int, inverse_temperature: Scale
) -> torch.Tensor:
    """Return (reference, rest, weighted, target) of each row's first `valid` columns: [N, 4] fp32, ignored rows 0."""
    target_N = _given(target_N, logits_NV)
    out_N4 = logits_NV.new_empty((logits_NV.shape[0], 4), dtype=torch.float32)
    if valid == 0:
        out_N4[:] = out_N4.new_tensor([-math.inf, 0.0, 0.0, -math.inf])
    else:
        for rows in _row_blocks(logits_NV):
            block_NV, column_N = logits_NV[rows, :valid].float(), target_N[rows] - vocab_start
            out_N4[rows] = _block_statistics(block_NV, column_N, _of_rows(inverse_temperature, rows))
    return out_N4.masked_fill_((target_N == IGNORE_INDEX)[:, None], 0.0)


def _block_statistics(x_NV: torch.Tensor, column_N: torch.Tensor, inverse_temperature: Scale) -> torch.Tensor:
    peak_N1 = x_NV.amax(-1, keepdim=True)
    base_N1 = torch.where(peak_N1 == -math.inf, 0.0, peak_N1)  # -inf - -inf would be NaN
    d_NV = (x_NV - base_N1) * _fp32_column(inverse_temperature)
    held_N1 = ((column_N >= 0) & (column_N < x_NV.shape[1]))[:, None]
    column_N1 = torch.where(held_N1, column_N[:, None], 0)
    target_N1 = torch.where(held_N1, d_NV.gather(1, column_N1), -math.inf)
    d_NV.scatter_(1, column_N1, torch.where(held_N1, -math.inf, d_NV.gather(1, column_N1)))
    e_NV = d_NV.exp()
    rest_N = e_NV.sum(-1)
    weighted_N = e_NV.mul_(d_NV.clamp_min_(-1e4)).sum(-1)  # clamped: 0 * -inf is NaN
    # From the row's maximum to the integer reference: [N]-sized, so fp64 costs nothing.
    peak_bits_N = peak_N1[:, 0].double() * (inverse_temperature * LOG2E)
    reference_N = peak_bits_N.ceil()
    shift_N = torch.where(peak_bits_N == -math.inf, 0.0, peak_bits_N - reference_N)  # in (-1, 0]; NaN for NaN and +inf
    nats_N, scale_N = shift_N * LN2, shift_N.exp2()
    weighted_N = scale_N * (weighted_N + nats_N * rest_N)
    return torch.stack([reference_N, scale_N * rest_N, weighted_N, target_N1[:, 0] + nats_N], dim=-1).float()


def combine(parts_RN4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge statistics [R, N, 4] of R disjoint parts: union [N, 4]; log p(target), entropy, log-normaliser: [N]."""
    reference_RN, rest_RN, weighted_RN, target_RN = parts_RN4.double().unbind(-1)
    common_N = reference_RN.amax(0)
    # A part without a finite logit has reference -inf and sums of 0: any finite shift is correct.
    shift_RN = torch.where(reference_RN == -math.inf, 0.0, reference_RN - common_N)
    nats_RN, scale_RN = shift_RN * LN2, shift_RN.exp2()
    rest_N = (scale_RN * rest_RN).sum(0)
    weighted_N = (scale_RN * (weighted_RN + nats_RN * rest_RN)).sum(0)
    whole_N4 = torch.stack([common_N, rest_N, weighted_N, (target_RN + nats_RN).amax(0)], dim=-1).float()
    _, total_N, log_prob_N, entropy_N = _finish(whole_N4)
    log_normalizer_N = total_N.log() + LN2 * whole_N4[:, 0].double()
    return whole_N4, log_prob_N.float(), entropy_N.float(), log_normalizer_N.float()


def _finish(statistics_N4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (e^d, A, log p(target), H), each [N] fp64."""
    _, rest_N, weighted_N, target_N = statistics_N4.double().unbind(-1)
    at_target_N = target_N.exp()
    total_N = rest_N + at_target_N
    log_total_N = total_N.log()
    weighted_N = weighted_N + torch.where(at_target_N > 0, target_N * at_target_N, 0.0)
    entropy_N = (log_total_N - weighted_N / total_N).clamp_min(0.0)
    likely_N = at_target_N > rest_N
    log_prob_N = torch.where(likely_N, 0.0 - (rest_N / at_target_N).log1p(), target_N - log_total_N)
    return at_target_N, total_N, log_prob_N, entropy_N


def logits_grad(
    logits_NV: torch.Tensor,
    grad_NV: torch.Tensor,
    target_N: torch.Tensor | None,
    statistics_N4: torch.Tensor,
    grad_log_prob_N: torch.Tensor | None,
    grad_entropy_N: torch.Tensor | None,
    grad_log_normalizer_N: torch.Tensor | None,
    vocab_start: int,
    valid: int,
    inverse_temperature: Scale,
) -> None:
    """Write the gradient of the three results, with the given weights [N] (None: 0), to `grad_NV`.

    `grad_NV` may be `logits_NV`. `statistics_N4` covers the whole vocabulary. Padded columns and ignored rows get
    zeros.
    """
    at_target_N, total_N, log_prob_N, entropy_N = _finish(statistics_N4)
    target_N = _given(target_N, logits_NV)
    gradients = (grad_log_prob_N, grad_entropy_N, grad_log_normalizer_N)
    g_N, h_N, l_N = (torch.zeros_like(total_N) if x is None else x.double() for x in gradients)
    scale_N = inverse_temperature / total_N
    constant_N = (scale_N * (h_N * (total_N.log() - entropy_N) - g_N + l_N)).float()
    slope_N = (-scale_N * h_N).float()
    certain_N = torch.where(at_target_N > 0, h_N * at_target_N * (log_prob_N + entropy_N), 0.0)
    grad_at_target_N = (scale_N * (g_N * statistics_N4[:, 1] - certain_N + l_N * at_target_N)).float()
    # x - c in nats: c as the sum of two fp32 numbers, so that an offset of the logits costs no accuracy
    reference_N = statistics_N4[:, 0].double() * (LN2 / inverse_temperature)
    high_N = reference_N.float()
    low_N = ((reference_N - high_N) * inverse_temperature).float()
    column_N = target_N - vocab_start
    held_N = (column_N >= 0) & (column_N < valid)
    for rows in _row_blocks(logits_NV) if valid > 0 else []:
        nats_per_logit = _fp32_column(_of_rows(inverse_temperature, rows))
        d_NV = (logits_NV[rows, :valid].float() - high_N[rows, None]) * nats_per_logit - low_N[rows, None]
        block_NV = d_NV.exp()
        if grad_entropy_N is None:
            block_NV *= constant_N[rows, None]
        else:  # e (constant + slope d) is 0 at e = 0
            block_NV *= d_NV.clamp_min_(-1e4).mul_(slope_N[rows, None]).add_(constant_N[rows, None])
        column_N1 = torch.where(held_N[rows], column_N[rows], 0)[:, None]
        at_target_N1 = torch.where(held_N[rows, None], grad_at_target_N[rows, None], block_NV.gather(1, column_N1))
        block_NV.scatter_(1, column_N1, at_target_N1)
        block_NV.masked_fill_((target_N[rows] == IGNORE_INDEX)[:, None], 0.0)
        grad_NV[rows, :valid] = block_NV.to(grad_NV.dtype)
    grad_NV[:, valid:] = 0
