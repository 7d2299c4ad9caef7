"""What context-parallel ranks tell each other: keys and values before attention, scores behind the LM head."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_egrsd.data.zigzag import zigzag


def gather_tokens(x: torch.Tensor, cu_seqlens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T / size, ...] of each rank (data/zigzag.py) -> [T, ...] in the order of the packed row.

    Every rank's gradient of the whole reaches the rank that a token came from, summed.
    """
    places = torch.cat([zigzag(cu_seqlens, rank, group.size()) for rank in range(group.size())])
    return gather_from_sequence_parallel_region(x, group=group).index_select(0, places.argsort())


def gather_scores(scores: torch.Tensor, own: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[2, r] of each rank's response tokens `own` [r] int64 -> [2, `total`] of all, the same on every rank.

    What all ranks compute from it is one loss: each keeps the gradient of its own columns, and nothing is summed.
    """
    return _Scores.apply(scores, own, total, group)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, own, total, group):
        ctx.save_for_backward(own)
        whole = scores.new_zeros(2, total)
        whole[:, own] = scores
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient):
        (own,) = ctx.saved_tensors
        return gradient[:, own], None, None, None
