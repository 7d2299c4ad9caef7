"""Assignment of the tokens of a packed row to context-parallel ranks."""

import torch


def zigzag(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return [T / size] int64: the places in the packed row of the tokens that `rank` of `size` holds, in its order.

    Each sequence is 2 x size chunks of equal length, and a rank holds chunks `rank` and 2 x size - 1 - rank of it: an
    early and a late one, so that causal attention costs every rank the same. This is the convention of megatron-core's
    rotary embedding and of Transformer Engine's attention and thd_get_partitioned_indices.

    Args:
        cu_seqlens: [B + 1] int, the bounds of the sequences; their lengths are multiples of 2 x size if size > 1.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    chunk = cu_seqlens.diff() // (2 * size)
    starts = torch.stack([cu_seqlens[:-1] + rank * chunk, cu_seqlens[1:] - (rank + 1) * chunk], 1).flatten()
    lengths = chunk.repeat_interleave(2)
    before = lengths.cumsum(0) - lengths
    shift = (starts - before).repeat_interleave(lengths)
    return torch.arange(shift.numel(), device=shift.device) + shift
