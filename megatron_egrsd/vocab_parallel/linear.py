"""LM head, log-probability and entropy in one function: the logits exist one vocabulary chunk at a time.

Chunks run over the vocabulary, not over the tokens: each chunk's weight gradient is then final when it is computed,
so it goes straight into its rows of the result, and the transient memory (tokens x chunk) does not depend on V.
Backward needs the logits once more. As many chunks as fit into a fixed budget are kept for it, the rest is recomputed.
"""

import torch
import torch.distributed as dist

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts, gather_sequence, reduce_hidden
from megatron_egrsd.vocab_parallel.shard import LOGIT_DTYPES, Shard, check_target, check_temperature

_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}  # logits held at a time: fits the L3 cache; occupies a GPU
_KEEP_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # a small part of the machine; TP 8 and 8192 bf16 tokens of Qwen3 fit


def linear_log_prob_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,
    keep_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `log_prob_and_entropy(hidden @ weight.T, target)` without all logits: both results [...] fp32, nats.

    Forward makes one all-gather of four floats a token; backward recomputes the logits that were not kept and reduces
    the gradient of `hidden` over the group once, in fp32. With `sequence_parallel` the sequence is gathered in forward
    and its gradient reduce-scattered in backward instead.

    hidden             [..., D]; with sequence_parallel this rank's [S / ranks, ..., D] of the sequence dimension
    weight             [V / ranks, D], dtype of hidden: the LM head, or the embedding table when the two are tied
    target             [...] int64 global ids (the full sequence also with sequence_parallel); -100 gives exact zeros
    chunk_size         vocabulary columns at a time; default: as many as keep tokens x columns at a fixed size
    logits_dtype       float32 keeps the GEMM's accuracy (bf16 logits cost about 1e-2 in a log-prob). Default: float32
                       if the GEMM writes it at no cost (CUDA), else the dtype of hidden
    keep_bytes         logits kept from forward to backward, if a gradient is required; 0 keeps none. Default:
                       64 MiB (CPU), 1 GiB (CUDA). Each micro-batch in flight in a pipeline holds as much
    The other arguments and the errors are those of `log_prob_and_entropy`.
    """
    _check_operands(hidden, weight, chunk_size, logits_dtype)
    if keep_bytes is not None and keep_bytes < 0:
        raise ValueError(f"keep_bytes must not be negative, got {keep_bytes}")
    check_temperature(temperature)
    shard = Shard.of(weight.shape[0], group, vocab_size)
    sequence_ranks = shard.ranks if sequence_parallel else 1
    tokens_shape = hidden.shape[:-1]
    if sequence_ranks > 1:
        if hidden.dim() < 2:
            raise ValueError(f"sequence_parallel needs hidden [S / ranks, ..., D], got {tuple(hidden.shape)}")
        tokens_shape = torch.Size((hidden.shape[0] * sequence_ranks, *hidden.shape[1:-1]))
    check_target(target, tokens_shape, "hidden's tokens", hidden.device, shard.vocab_size)
    if logits_dtype is None:
        logits_dtype = torch.float32 if hidden.is_cuda else hidden.dtype
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        keep_bytes = 0
    chunk_size, kept_chunks = chunk_plan(
        hidden.device.type, target.numel(), shard.columns, logits_dtype.itemsize, chunk_size, keep_bytes
    )
    log_prob_N, entropy_N = _LinearLogProbAndEntropy.apply(
        hidden, weight, target.reshape(-1), shard, temperature, entropy_grad,
        chunk_size, sequence_ranks > 1, logits_dtype, kept_chunks,
    )  # fmt: skip
    return log_prob_N.view(target.shape), entropy_N.view(target.shape)


def chunk_plan(
    device_type: str,
    tokens: int,
    columns: int,
    itemsize: int,
    chunk_size: int | None = None,
    keep_bytes: int | None = None,
) -> tuple[int, int]:
    """Return (columns of a chunk, number of chunks that are kept for backward) for logits [tokens, columns].

    `itemsize` is in bytes an element; None stands for the defaults of `device_type`.
    """
    if chunk_size is None:
        chunk_size = max(1024, _CHUNK_ELEMENTS.get(device_type, 1 << 27) // max(1, tokens) // 64 * 64)
    if keep_bytes is None:
        keep_bytes = _KEEP_BYTES.get(device_type, 0)
    chunk_size = min(chunk_size, columns)
    return chunk_size, keep_bytes // max(1, tokens * chunk_size * itemsize)


def _check_operands(hidden, weight, chunk_size, logits_dtype) -> None:
    if hidden.dim() < 1 or hidden.dtype not in LOGIT_DTYPES:
        raise ValueError(f"hidden must be [..., D] fp32, bf16 or fp16, got {hidden.dtype} {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] to match hidden, got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight {tuple(weight.shape)} is {weight.dtype} on {weight.device}, "
            f"hidden {tuple(hidden.shape)} is {hidden.dtype} on {hidden.device}: they must agree"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if logits_dtype not in (None, torch.float32, hidden.dtype):
        raise ValueError(f"logits_dtype must be float32 or hidden's {hidden.dtype}, got {logits_dtype}")


class _LinearLogProbAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight_VD, target_N, shard, temperature, entropy_grad, chunk, sequence_parallel, logits_dtype,
        kept_chunks,
    ):  # fmt: skip
        hidden_ND = (gather_sequence(hidden, shard) if sequence_parallel else hidden).reshape(-1, hidden.shape[-1])
        part_N4 = None
        ctx.kept = _empty_chunks(hidden_ND, shard, chunk, logits_dtype, kept_chunks)
        for columns, logits_NC in _logit_chunks(hidden_ND, weight_VD, shard, chunk, logits_dtype, ctx.kept):
            chunk_N4 = ops.statistics(logits_NC, target_N, shard.slice(columns.start, columns.stop), temperature)
            part_N4 = chunk_N4 if part_N4 is None else ops.combine(torch.stack([part_N4, chunk_N4]))[0]
        statistics_N4, log_prob_N, entropy_N = ops.combine(gather_parts(part_N4, shard))
        # The gathered sequence is kept, so that backward needs no second gather.
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, statistics_N4)
        ctx.shard, ctx.temperature, ctx.entropy_grad = shard, temperature, entropy_grad
        ctx.chunk, ctx.sequence_parallel, ctx.logits_dtype = chunk, sequence_parallel, logits_dtype
        ctx.hidden_shape = hidden.shape
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return log_prob_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_prob_N, grad_entropy_N):
        hidden_ND, weight_VD, target_N, statistics_N4 = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_log_prob_N = grad_log_prob_N.contiguous()
        grad_entropy_N = grad_entropy_N.contiguous() if ctx.entropy_grad else None
        # Chunks add up in fp32: a bf16 sum over tens of chunks has an error that the reduction over ranks multiplies.
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if need_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if need_weight else None
        # The gradient overwrites the kept logits, so that a second backward pass must compute all of them.
        kept, ctx.kept = ctx.kept, []
        chunks = _logit_chunks(hidden_ND, weight_VD, ctx.shard, ctx.chunk, ctx.logits_dtype, kept, computed=True)
        for columns, logits_NC in chunks:
            grad_NC = ops.logits_grad(
                logits_NC, target_N, statistics_N4, grad_log_prob_N, grad_entropy_N,
                ctx.shard.slice(columns.start, columns.stop), ctx.temperature, inplace=True,
            ).to(hidden_ND.dtype)  # fmt: skip
            if need_hidden:
                grad_hidden_ND += grad_NC @ weight_VD[columns]
            if need_weight:
                torch.mm(grad_NC.t(), hidden_ND, out=grad_weight_VD[columns])
        if need_hidden:
            grad_hidden = reduce_hidden(grad_hidden_ND, ctx.shard, ctx.sequence_parallel)
            grad_hidden = grad_hidden.to(hidden_ND.dtype).view(ctx.hidden_shape)
        else:
            grad_hidden = None
        return grad_hidden, grad_weight_VD, *[None] * 8


def _empty_chunks(hidden_ND, shard: Shard, chunk: int, logits_dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """Allocate [N, C] for the logits of each of the first `count` chunks, or of all if there are fewer."""
    widths = [min(chunk, shard.columns - first) for first in range(0, shard.columns, chunk)][:count]
    return [hidden_ND.new_empty((hidden_ND.shape[0], width), dtype=logits_dtype) for width in widths]


def _logit_chunks(
    hidden_ND, weight_VD, shard: Shard, chunk: int, logits_dtype: torch.dtype, kept: list[torch.Tensor], computed=False
):
    """Yield (columns, logits [N, C] of those columns); the caller may overwrite them.

    The first chunks are stored in `kept` and read from it if `computed`; all other chunks share one buffer.
    """
    tokens = hidden_ND.shape[0]
    widen = logits_dtype != hidden_ND.dtype
    left_over = shard.columns - sum(k.shape[1] for k in kept)
    buffer = hidden_ND.new_empty(tokens * min(chunk, left_over), dtype=logits_dtype)
    if widen and not hidden_ND.is_cuda:
        hidden_ND = hidden_ND.to(logits_dtype)
    for i, first in enumerate(range(0, shard.columns, chunk)):
        columns = slice(first, min(first + chunk, shard.columns))
        width = columns.stop - columns.start
        is_kept = i < len(kept)
        logits_NC = kept[i] if is_kept else buffer[: tokens * width].view(tokens, width)  # not -1: maybe no tokens
        if not (is_kept and computed):
            weight_CD = weight_VD[columns]
            if widen and hidden_ND.is_cuda:  # bf16 GEMM with fp32 output: the accumulators are stored as they are
                torch.mm(hidden_ND, weight_CD.t(), out_dtype=logits_dtype, out=logits_NC)
            else:
                torch.mm(hidden_ND, weight_CD.to(logits_dtype).t(), out=logits_NC)
        yield columns, logits_NC
