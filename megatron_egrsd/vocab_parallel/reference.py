"""The two row kernels in plain torch: what runs where the compiled ones do not. Same contract, many times slower.

Statistics of a row x (already masked to its valid columns), with y_j = x_j * log2(e) / temperature:

    reference  an integer c near max(y), -inf for a row without a finite maximum
    total      A = sum_j 2^(y_j - c)
    weighted   S = sum_j 2^(y_j - c) (y_j - c) ln 2
    target     (y_target - c) ln 2, -inf where this shard does not hold the target

so log p(target) = target - ln A and H = ln A - S / A. c counts in powers of two and is an integer, so that changing
it (between blocks, shards or vocabulary chunks) scales A and S exactly. H computed as lse - sum(p x) would cancel
for offset logits; ln A - S / A does not.
"""

import math

import torch

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
_BLOCK_ELEMENTS = 1 << 22  # rows are taken in blocks of at most this many logits, so temporaries stay near 50 MB


def _row_blocks(logits_NV: torch.Tensor) -> range:
    return range(0, logits_NV.shape[0], max(1, _BLOCK_ELEMENTS // max(1, logits_NV.shape[1])))


def statistics(
    logits_NV: torch.Tensor, target_N: torch.Tensor, vocab_start: int, valid: int, inverse_temperature: float
) -> torch.Tensor:
    """[N, 4] fp32: reference, total, weighted, target of each row's first `valid` columns."""
    out_N4 = logits_NV.new_empty((logits_NV.shape[0], 4), dtype=torch.float32)
    blocks = _row_blocks(logits_NV)
    for first in blocks:
        rows = slice(first, first + blocks.step)
        out_N4[rows] = _block_statistics(logits_NV[rows, :valid], target_N[rows] - vocab_start, inverse_temperature)
    return out_N4


def _block_statistics(logits_NV: torch.Tensor, column_N: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    if logits_NV.shape[1] == 0:
        return torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).to(logits_NV.device).expand(logits_NV.shape[0], 4)
    x_NV = logits_NV.float()
    peak_N1 = x_NV.amax(-1, keepdim=True)
    base_N1 = torch.where(peak_N1 == -math.inf, torch.zeros_like(peak_N1), peak_N1)  # -inf - -inf would be NaN
    d_NV = (x_NV - base_N1).mul_(inverse_temperature)
    e_NV = d_NV.exp()
    total_N = e_NV.sum(-1)
    # 0 * -inf at masked columns; a NaN logit stays visible in `total`
    weighted_N = e_NV.mul_(d_NV.clamp_min_(-1e4)).sum(-1)
    # from the row's maximum to the integer reference; [N]-sized, so fp64 costs nothing
    peak_bits_N = peak_N1[:, 0].double() * (inverse_temperature * LOG2E)
    reference_N = peak_bits_N.ceil()
    shift_N = torch.where(reference_N.isfinite(), peak_bits_N - reference_N, 0.0)  # in (-1, 0], bits
    scale_N = shift_N.exp2()
    held_N = (column_N >= 0) & (column_N < logits_NV.shape[1])
    x_target_N = x_NV.gather(1, torch.where(held_N, column_N, 0)[:, None])[:, 0]
    target_N = (x_target_N - base_N1[:, 0]).double() * inverse_temperature + shift_N * LN2
    return torch.stack(
        [
            reference_N,
            total_N * scale_N,
            scale_N * (weighted_N + shift_N * LN2 * total_N),
            torch.where(held_N, target_N, -math.inf),
        ],
        dim=-1,
    ).float()


def logits_grad(
    logits_NV: torch.Tensor,
    grad_NV: torch.Tensor,
    target_N: torch.Tensor,
    statistics_N4: torch.Tensor,
    grad_log_prob_N: torch.Tensor,
    grad_entropy_N: torch.Tensor | None,
    vocab_start: int,
    valid: int,
    inverse_temperature: float,
    ignore_index: int,
) -> None:
    """Write the gradient of `grad_log_prob . log_prob + grad_entropy . entropy` to `grad_NV` (which may be `logits_NV`).

    `statistics_N4` are those of the whole vocabulary (all shards combined). Padded columns and ignored rows get zeros.
    """
    blocks = _row_blocks(logits_NV)
    for first in blocks:
        rows = slice(first, first + blocks.step)
        reference_N, total_N, weighted_N, _ = statistics_N4[rows].double().unbind(-1)
        log_total_N = total_N.log()
        # log p = (x - reference) - ln A; the reference is brought to nats in fp64 and split in two fp32 parts
        offset_N = reference_N * (LN2 / inverse_temperature)
        high_N = offset_N.float()
        low_N = ((offset_N - high_N) * inverse_temperature + log_total_N).float()
        log_p_NV = (logits_NV[rows, :valid].float() - high_N[:, None]).mul_(inverse_temperature).sub_(low_N[:, None])
        factor_NV = -grad_log_prob_N[rows, None]
        if grad_entropy_N is not None:
            entropy_N = (log_total_N - weighted_N / total_N).float()
            # p (log p + H) is 0 at p = 0
            factor_NV = factor_NV - grad_entropy_N[rows, None] * (log_p_NV.clamp_min(-1e4) + entropy_N[:, None])
        block_NV = log_p_NV.exp_().mul_(factor_NV)
        column_N = target_N[rows] - vocab_start
        held_N = (column_N >= 0) & (column_N < valid)
        if valid > 0:
            at_target_N1 = torch.where(held_N, grad_log_prob_N[rows], 0.0)[:, None]
            block_NV.scatter_add_(1, torch.where(held_N, column_N, 0)[:, None], at_target_N1)
        block_NV.mul_(inverse_temperature).masked_fill_((target_N[rows] == ignore_index)[:, None], 0.0)
        grad_NV[rows, :valid] = block_NV.to(grad_NV.dtype)
    grad_NV[:, valid:] = 0
