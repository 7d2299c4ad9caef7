"""Give context-parallel ranks the whole row: its bounds, keys and values in attention, columns for the loss."""

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_egrsd.data.packing import MicroBatch
from megatron_egrsd.data.zigzag import zigzag


def packed_seq_params(batch: MicroBatch, group: dist.ProcessGroup) -> PackedSeqParams:
    """Return the bounds of the whole row's sequences.

    Padding ends its sequence, where no other token sees it: to attention these are tokens like all others. The padded
    bounds, which Transformer Engine splits by, are the same.
    """
    padded = batch.cu_seqlens if group.size() > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def gather_tokens(x: torch.Tensor, cu_seqlens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather [T / size, ...] of each rank (data/zigzag.py) to [T, ...] in the order of the packed row.

    Every rank's gradient of the whole reaches the rank that a token came from, summed.
    """
    places = torch.cat([zigzag(cu_seqlens, rank, group.size()) for rank in range(group.size())])
    return gather_from_sequence_parallel_region(x, group=group).index_select(0, places.argsort())


def gather_columns(columns: torch.Tensor, batch: MicroBatch, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather [k, r] of each rank's own response tokens to [k, R] of all in the batch, the same on every rank.

    All ranks compute one loss from the result: each keeps the gradient of its own columns, and nothing is summed.
    """
    return _Columns.apply(columns, batch.own, batch.targets.numel(), group) if group.size() > 1 else columns


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, own, total, group):
        ctx.save_for_backward(own)
        whole = columns.new_zeros(columns.shape[0], total)
        whole[:, own] = columns
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient):
        (own,) = ctx.saved_tensors
        return gradient[:, own], None, None, None
