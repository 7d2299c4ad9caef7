"""The collectives of the package: one gather in forward and, for the linear form, one reduction in backward."""

import torch
import torch.distributed as dist

from megatron_egrsd.vocab_parallel.shard import Shard

# torch 2.13 renamed these; 2.11 knows only the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_parts(part: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return every rank's `part`, stacked in rank order: [R, ...]."""
    if shard.ranks == 1:
        return part[None]
    parts = part.new_empty((shard.ranks, *part.shape))
    _all_gather(parts.view(-1, *part.shape[1:]), part.contiguous(), group=shard.group)
    return parts


def gather_sequence(hidden: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Gather [S, ...] from every rank's [S / R, ...]."""
    return gather_parts(hidden, shard).flatten(0, 1)


def sum_over_ranks(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Sum `x` over the ranks, in place. Its gradient on each rank is the upstream one: every rank has the same."""
    if shard.ranks > 1:
        dist.all_reduce(x, group=shard.group)
    return x


class SumGradient(torch.autograd.Function):
    """The identity whose gradient is summed over the ranks: for a value that each rank uses on its own columns."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, shard: Shard) -> torch.Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return sum_over_ranks(grad.clone(), ctx.shard), None


def reduce_hidden(grad_ND: torch.Tensor, shard: Shard, sequence_parallel: bool) -> torch.Tensor:
    """Sum over the ranks' vocabulary shards. With sequence parallelism each rank keeps its own part of the tokens."""
    if not sequence_parallel:
        return sum_over_ranks(grad_ND, shard)
    own_ND = grad_ND.new_empty((grad_ND.shape[0] // shard.ranks, grad_ND.shape[1]))
    _reduce_scatter(own_ND, grad_ND, group=shard.group)
    return own_ND
