"""LM head, log-probability and entropy in one function: the logits exist one vocabulary chunk at a time.

Chunks run over the vocabulary, not over the tokens: each chunk's weight gradient is then final when it is computed,
so it goes straight into its rows of the result, and the transient memory (tokens x chunk) does not depend on V.
Backward needs the logits once more. As many chunks as fit into a fixed budget are kept for it, the rest is recomputed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.chunks import Chunks, chunk_plan, project
from megatron_egrsd.vocab_parallel.collectives import gather_parts, gather_sequence, reduce_hidden
from megatron_egrsd.vocab_parallel.log_prob import TokenStatistics, zero_where_unknown
from megatron_egrsd.vocab_parallel.shard import (
    IGNORE_INDEX,
    LOGIT_DTYPES,
    Shard,
    prepare_target,
    prepare_temperature,
)


class _Plan(NamedTuple):
    """The arguments of `linear_token_statistics` that decide how chunks are computed and where gradients go."""

    grad_dtype: torch.dtype
    gather_sequence: bool
    reduce_hidden_grad: bool
    main_grad: bool
    entropy_grad: bool
    observe: Callable[[torch.Tensor], None] | None


def linear_token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    entropy_grad: bool = False,
    ignore_index: int = IGNORE_INDEX,
    out_of_vocabulary: str = "error",
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    reduce_hidden_grad: bool = True,
    logits_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    main_grad: bool = False,
    keep_bytes: int | None = None,
    observe: Callable[[torch.Tensor], None] | None = None,
) -> TokenStatistics:
    """Compute `token_statistics(hidden @ weight.T, target)` without all logits: three results [...] fp32, nats.

    Forward makes one all-gather of four floats a token; backward recomputes the logits that were not kept and reduces
    the gradient of `hidden` over the group once, in fp32. With `sequence_parallel` the sequence is gathered in forward
    and its gradient reduce-scattered in backward instead.

    hidden             [..., D]; with sequence_parallel this rank's [S / ranks, ..., D] of the sequence dimension
    weight             [V / ranks, D], dtype of hidden: the LM head, or the embedding table when the two are tied
    target             [...] int64 global ids (the full sequence also with sequence_parallel); -100 gives exact zeros
    chunk_size         vocabulary columns at a time; default: as many as keep tokens x columns at a fixed size
    reduce_hidden_grad False if a layer before the call sums the gradient of `hidden` over the group, as Megatron's
                       column-parallel layers and verl do: each rank then returns its own columns' part
    logits_dtype       float32 keeps the GEMM's accuracy (bf16 logits cost about 1e-2 in a log-prob). Default: float32
                       if the GEMM writes it at no cost (CUDA), else the dtype of hidden
    grad_dtype         dtype of the logits' gradient in the two GEMMs of backward. float32: neither is rounded to the
                       dtype of hidden, at the cost of fp32 GEMMs. Default: the dtype of hidden
    main_grad          add the weight's gradient to `weight.main_grad`, as Megatron's gradient accumulation fusion
                       does, and set `weight.grad_added_to_main_grad`; the gradient that autograd gets is then unset
                       memory, which Megatron's hook ignores
    keep_bytes         logits kept from forward to backward, if a gradient is required; 0 keeps none. Default:
                       64 MiB (CPU), 1 GiB (CUDA). Each micro-batch in flight in a pipeline holds as much
    observe            called in forward with each chunk of this rank's logits [tokens, columns], for what the results
                       do not tell (their extremes, their norm). It must neither change nor keep them
    The other arguments and the errors are those of `token_statistics`.
    """
    check_operands(hidden, weight, chunk_size, logits_dtype, grad_dtype, keep_bytes)
    if sequence_parallel and not reduce_hidden_grad:
        raise ValueError("sequence_parallel reduces the gradient of hidden where it scatters it")
    if main_grad and not (hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")):
        raise ValueError("main_grad needs a weight with main_grad and grad_added_to_main_grad, as Megatron's DDP sets")
    shard = Shard.of(weight.shape[0], group, vocab_size)
    sequence_ranks = shard.ranks if sequence_parallel else 1
    tokens_shape = hidden.shape[:-1]
    if sequence_ranks > 1:
        if hidden.dim() < 2:
            raise ValueError(f"sequence_parallel needs hidden [S / ranks, ..., D], got {tuple(hidden.shape)}")
        tokens_shape = torch.Size((hidden.shape[0] * sequence_ranks, *hidden.shape[1:-1]))
    temperature = prepare_temperature(temperature, tokens_shape)
    target_N = prepare_target(
        target, tokens_shape, "hidden's tokens", hidden.device, shard.vocab_size, ignore_index, out_of_vocabulary
    )
    if logits_dtype is None:
        logits_dtype = torch.float32 if hidden.is_cuda else hidden.dtype
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        keep_bytes = 0
    chunk_size, kept_chunks = chunk_plan(
        hidden.device.type, target.numel(), shard.columns, logits_dtype.itemsize, chunk_size, keep_bytes
    )
    chunks = Chunks(target.numel(), shard.columns, chunk_size, kept_chunks, logits_dtype, hidden.device)
    plan = _Plan(grad_dtype or hidden.dtype, sequence_ranks > 1, reduce_hidden_grad, main_grad, entropy_grad, observe)
    results = _LinearTokenStatistics.apply(hidden, weight, target_N, shard, temperature, chunks, plan)
    log_prob, entropy, log_normalizer = (x.view(target.shape) for x in results)
    if out_of_vocabulary == "zero":
        log_prob = zero_where_unknown(log_prob, target_N)
    return TokenStatistics(log_prob, entropy, log_normalizer)


def linear_log_prob_and_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first two of `linear_token_statistics(hidden, weight, target, **options)`."""
    log_prob, entropy, _ = linear_token_statistics(hidden, weight, target, **options)
    return log_prob, entropy


def check_operands(hidden, weight, chunk_size, logits_dtype, grad_dtype=None, keep_bytes=None) -> None:
    """Raise ValueError unless the operands of an LM head fit each other, and the options them."""
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
    if keep_bytes is not None and keep_bytes < 0:
        raise ValueError(f"keep_bytes must not be negative, got {keep_bytes}")
    for name, dtype in (("logits_dtype", logits_dtype), ("grad_dtype", grad_dtype)):
        if dtype not in (None, torch.float32, hidden.dtype):
            raise ValueError(f"{name} must be float32 or hidden's {hidden.dtype}, got {dtype}")


class _LinearTokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight_VD, target_N, shard, temperature, chunks, plan):
        hidden_ND = (gather_sequence(hidden, shard) if plan.gather_sequence else hidden).reshape(-1, hidden.shape[-1])
        part_N4 = None
        for columns, logits_NC in _logit_chunks(chunks, hidden_ND, weight_VD):
            if plan.observe is not None:
                plan.observe(logits_NC)
            chunk_N4 = ops.statistics(logits_NC, target_N, shard.slice(columns.start, columns.stop), temperature)
            part_N4 = chunk_N4 if part_N4 is None else ops.combine(torch.stack([part_N4, chunk_N4]))[0]
        statistics_N4, log_prob_N, entropy_N, log_normalizer_N = ops.combine(gather_parts(part_N4, shard))
        # The gathered sequence is kept, so that backward needs no second gather.
        per_token = isinstance(temperature, torch.Tensor)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, statistics_N4, temperature if per_token else None)
        ctx.temperature = None if per_token else temperature
        ctx.shard, ctx.chunks, ctx.plan, ctx.hidden_shape = shard, chunks, plan, hidden.shape
        ctx.set_materialize_grads(False)
        if not plan.entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return log_prob_N, entropy_N, log_normalizer_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_prob_N, grad_entropy_N, grad_log_normalizer_N):
        hidden_ND, weight_VD, target_N, statistics_N4, temperature_N = ctx.saved_tensors
        shard, plan = ctx.shard, ctx.plan
        temperature = ctx.temperature if temperature_N is None else temperature_N
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        given = (grad_log_prob_N, grad_entropy_N if plan.entropy_grad else None, grad_log_normalizer_N)
        gradients = ops.Gradients(*(None if g is None else g.contiguous() for g in given))
        # Chunks add up in fp32: a bf16 sum over tens of chunks has an error that the reduction over ranks multiplies.
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if need_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if need_weight else None
        wide_ND = hidden_ND.to(plan.grad_dtype)
        # The gradient overwrites the kept logits, so that a second backward pass must compute all of them.
        for columns, logits_NC in _logit_chunks(ctx.chunks.take(), hidden_ND, weight_VD):
            grad_NC = ops.logits_grad(
                logits_NC, target_N, statistics_N4, gradients, shard.slice(columns.start, columns.stop), temperature,
                inplace=True,
            ).to(plan.grad_dtype)  # fmt: skip
            if need_hidden:
                grad_hidden_ND += grad_NC @ weight_VD[columns].to(plan.grad_dtype)
            if need_weight and plan.main_grad:
                weight_VD.main_grad[columns] += grad_NC.t() @ wide_ND
            elif need_weight and plan.grad_dtype == weight_VD.dtype:
                torch.mm(grad_NC.t(), hidden_ND, out=grad_weight_VD[columns])
            elif need_weight:
                grad_weight_VD[columns] = (grad_NC.t() @ wide_ND).to(weight_VD.dtype)
        if need_weight and plan.main_grad:
            weight_VD.grad_added_to_main_grad = True
        grad_hidden = None
        if need_hidden:
            if plan.reduce_hidden_grad:
                grad_hidden_ND = reduce_hidden(grad_hidden_ND, shard, plan.gather_sequence)
            grad_hidden = grad_hidden_ND.to(hidden_ND.dtype).view(ctx.hidden_shape)
        return grad_hidden, grad_weight_VD, None, None, None, None, None


def _logit_chunks(chunks: Chunks, hidden_ND, weight_VD) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (columns, logits [N, C] of those columns); a last reading may overwrite them."""
    for columns, logits_NC, computed in chunks:
        if not computed:
            project(hidden_ND, weight_VD[columns], logits_NC)
        yield columns, logits_NC
