"""Two LM heads and the divergence of their distributions in one function: neither model's logits exist as a whole.

Chunks of the vocabulary are computed for both models, read together and dropped. Backward needs the logits once more,
so it computes them again, as a second reading does. Where one weight serves both models, as a LoRA student's and its
frozen teacher's, the two hidden states go through one GEMM, which reads the weight once.
"""

from collections.abc import Iterator
from typing import Any

import torch

from megatron_egrsd.vocab_parallel import pair_ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts, gather_sequence, reduce_hidden
from megatron_egrsd.vocab_parallel.divergence import (
    Divergence,
    check_temperature,
    plain_sums,
    summed_entries,
)
from megatron_egrsd.vocab_parallel.form import check_form
from megatron_egrsd.vocab_parallel.linear import check_operands, chunk_plan
from megatron_egrsd.vocab_parallel.pair_ops import Form
from megatron_egrsd.vocab_parallel.shard import Shard


@torch.compiler.disable
def linear_divergence(
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    *,
    kind: str,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    beta: float = 0.5,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> Divergence:
    """Compute `divergence(teacher_hidden @ teacher_weight.T, student_hidden @ student_weight.T)` without the logits.

    Gradients flow into the student's hidden state and weight. Every chunk of logits of either model is computed once
    in forward (twice for a `kind` or option of two readings) and once in backward. Collectives are those of
    `divergence`, and in backward one reduction of the gradient of `student_hidden`, in fp32. With `sequence_parallel`
    both sequences are gathered in forward and the gradient is reduce-scattered instead.

    teacher_hidden, student_hidden   [..., D]; the two models' D may differ. With sequence_parallel this rank's
                     [S / ranks, ..., D] of the sequence dimension
    teacher_weight, student_weight   [V / ranks, D], dtypes of the hidden states; the same tensor twice is read once
    chunk_size       vocabulary columns at a time; default: as many as keep both models' logits at a fixed size
    logits_dtype     as in `linear_token_statistics`; the same for both models
    The other arguments and the errors are those of `divergence`, which alone has top_k.
    """
    for hidden, weight in ((teacher_hidden, teacher_weight), (student_hidden, student_weight)):
        check_operands(hidden, weight, chunk_size, logits_dtype)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1] or teacher_hidden.dtype != student_hidden.dtype:
        raise ValueError(
            f"teacher_hidden {teacher_hidden.dtype} {tuple(teacher_hidden.shape)} and student_hidden "
            f"{student_hidden.dtype} {tuple(student_hidden.shape)} must have the same tokens and dtype"
        )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight {tuple(teacher_weight.shape)} and student_weight {tuple(student_weight.shape)} must have "
            "one vocabulary"
        )
    form, temperature = check_form(kind, entry_clip, beta), check_temperature(temperature)
    shard = Shard.of(student_weight.shape[0], group, vocab_size)
    gathers = sequence_parallel and shard.ranks > 1
    if gathers and student_hidden.dim() < 2:
        raise ValueError(f"sequence_parallel needs hidden [S / ranks, ..., D], got {tuple(student_hidden.shape)}")
    tokens_shape = student_hidden.shape[:-1]
    if gathers:
        tokens_shape = torch.Size((student_hidden.shape[0] * shard.ranks, *student_hidden.shape[1:-1]))
    if logits_dtype is None:
        logits_dtype = torch.float32 if student_hidden.is_cuda else student_hidden.dtype
    chunk, _ = chunk_plan(
        student_hidden.device.type, 2 * tokens_shape.numel(), shard.columns, logits_dtype.itemsize, chunk_size, 0
    )
    results = _LinearDivergence.apply(
        teacher_hidden.detach(), teacher_weight.detach(), student_hidden, student_weight,
        teacher_weight is student_weight, shard, temperature, form, chunk, gathers, logits_dtype,
    )  # fmt: skip
    value, teacher_entropy = (x.view(tokens_shape) for x in results)
    return Divergence(value, teacher_entropy)


def _chunks(
    teacher_ND: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    student_ND: torch.Tensor,
    student_weight_VD: torch.Tensor,
    shared: bool,
    shard: Shard,
    chunk: int,
    logits_dtype: torch.dtype,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (columns, teacher's logits [N, C], student's logits [N, C]); the caller may overwrite them."""
    tokens = student_ND.shape[0]
    buffer = student_ND.new_empty(2 * tokens * chunk, dtype=logits_dtype)
    both_ND = torch.cat([teacher_ND, student_ND]) if shared else None
    for first in range(0, shard.columns, chunk):
        columns = slice(first, min(first + chunk, shard.columns))
        width = columns.stop - columns.start
        logits = buffer[: 2 * tokens * width].view(2 * tokens, width)
        teacher_NC, student_NC = logits[:tokens], logits[tokens:]
        if both_ND is not None:
            _project(both_ND, student_weight_VD[columns], logits)
        else:
            _project(teacher_ND, teacher_weight_VD[columns], teacher_NC)
            _project(student_ND, student_weight_VD[columns], student_NC)
        yield columns, teacher_NC, student_NC


def _project(hidden_ND: torch.Tensor, weight_CD: torch.Tensor, out_NC: torch.Tensor) -> None:
    if out_NC.dtype == hidden_ND.dtype:
        torch.mm(hidden_ND, weight_CD.t(), out=out_NC)
    elif hidden_ND.is_cuda:  # the GEMM stores its fp32 accumulators as they are
        torch.mm(hidden_ND, weight_CD.t(), out_dtype=out_NC.dtype, out=out_NC)
    else:
        torch.mm(hidden_ND.to(out_NC.dtype), weight_CD.to(out_NC.dtype).t(), out=out_NC)


# One function for each reading: on return it drops its last views of the logits, before the next reading makes others.


def _first_reading(operands: tuple, plan: tuple, temperature: float, form: Form) -> torch.Tensor:
    """Return the PairStatistics [N, 8] of this rank's columns."""
    part_N8, shard = None, plan[1]
    for columns, teacher_NC, student_NC in _chunks(*operands, *plan):
        pair = (student_NC, teacher_NC) if form.student_first else (teacher_NC, student_NC)
        shard_of_chunk = shard.slice(columns.start, columns.stop)
        chunk_N8 = pair_ops.statistics(*pair, shard_of_chunk, temperature, form.student_first)
        part_N8 = chunk_N8 if part_N8 is None else pair_ops.merge(torch.stack([part_N8, chunk_N8]), temperature)
    return part_N8


def _second_reading(
    operands: tuple, plan: tuple, temperature: float, form: Form, scale_N5: torch.Tensor
) -> torch.Tensor:
    """Return the EntrySums [N, 3] of this rank's columns."""
    part_N3, shard = scale_N5.new_zeros((scale_N5.shape[0], 3)), plan[1]
    for columns, teacher_NC, student_NC in _chunks(*operands, *plan):
        shard_of_chunk = shard.slice(columns.start, columns.stop)
        part_N3 += pair_ops.entry_sums(teacher_NC, student_NC, scale_N5, form, shard_of_chunk, temperature)
    return part_N3


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, teacher_hidden, teacher_weight_VD, student_hidden, student_weight_VD, shared, shard, temperature, form,
        chunk, gathers, logits_dtype,
    ):  # fmt: skip
        hidden = [gather_sequence(x, shard) if gathers else x for x in (teacher_hidden, student_hidden)]
        teacher_ND, student_ND = (x.reshape(-1, x.shape[-1]) for x in hidden)
        operands = (teacher_ND, teacher_weight_VD, student_ND, student_weight_VD)
        plan = (shared, shard, chunk, logits_dtype)
        part_N8 = _first_reading(operands, plan, temperature, form)
        scale_N5, value_N, entropy_N = pair_ops.combine(gather_parts(part_N8, shard), temperature, form.student_first)
        if form.second_reading:
            part_N3 = _second_reading(operands, plan, temperature, form, scale_N5)
            sums_N3, value_N = summed_entries(gather_parts(part_N3, shard), form)
        else:
            sums_N3 = plain_sums(value_N)
        # The gathered sequences are kept, so that backward needs no second gather.
        ctx.save_for_backward(*operands, scale_N5, sums_N3)
        ctx.plan, ctx.temperature, ctx.form, ctx.gathers = plan, temperature, form, gathers
        ctx.hidden_shape = student_hidden.shape
        ctx.mark_non_differentiable(entropy_N)
        return value_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value_N, _):
        *operands, scale_N5, sums_N3 = ctx.saved_tensors
        _, _, student_ND, weight_VD = operands
        shared, shard, chunk, logits_dtype = ctx.plan
        need_hidden, need_weight = ctx.needs_input_grad[2:4]
        grad_value_N = grad_value_N.float().contiguous()
        # Chunks add up in fp32: a bf16 sum over tens of chunks has an error that the reduction over ranks multiplies.
        grad_hidden_ND = torch.zeros_like(student_ND, dtype=torch.float32) if need_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if need_weight else None
        for columns, teacher_NC, student_NC in _chunks(*operands, shared, shard, chunk, logits_dtype):
            grad_NC = pair_ops.gradient(
                teacher_NC, student_NC, scale_N5, sums_N3, grad_value_N, ctx.form,
                shard.slice(columns.start, columns.stop), ctx.temperature, inplace=True,
            ).to(student_ND.dtype)  # fmt: skip
            if need_hidden:
                grad_hidden_ND += grad_NC @ weight_VD[columns]
            if need_weight:
                torch.mm(grad_NC.t(), student_ND, out=grad_weight_VD[columns])
        grad_hidden = None
        if need_hidden:
            grad_hidden_ND = reduce_hidden(grad_hidden_ND, shard, ctx.gathers)
            grad_hidden = grad_hidden_ND.to(student_ND.dtype).view(ctx.hidden_shape)
        return None, None, grad_hidden, grad_weight_VD, *[None] * 7
