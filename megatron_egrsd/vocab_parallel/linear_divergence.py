"""Two LM heads and the divergence of their distributions in one function: neither model's logits exist as a whole.

Chunks of the vocabulary are computed for both models and read together. Backward needs the logits once more, as does a
second reading in forward: as many chunks as fit into a fixed budget are kept, the rest is recomputed. If one weight
serves both models, as a LoRA student's and its frozen teacher's, the two hidden states go through one GEMM, which reads
the weight once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megatron_egrsd.vocab_parallel import pair_ops
from megatron_egrsd.vocab_parallel import top_k as top_k_ops
from megatron_egrsd.vocab_parallel.chunks import Chunks, chunk_plan, project
from megatron_egrsd.vocab_parallel.collectives import gather_parts, gather_sequence, reduce_hidden
from megatron_egrsd.vocab_parallel.divergence import (
    Divergence,
    check_temperature,
    plain_sums,
    summed_entries,
)
from megatron_egrsd.vocab_parallel.form import TopK, check_form, check_top_k
from megatron_egrsd.vocab_parallel.linear import check_operands
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
    top_k: int | None = None,
    top_k_of: str = "student",
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    logits_dtype: torch.dtype | None = None,
    keep_bytes: int | None = None,
) -> Divergence:
    """Compute `divergence(teacher_hidden @ teacher_weight.T, student_hidden @ student_weight.T)` without the logits.

    Gradients flow into the student's hidden state and weight. Every chunk of logits of either model is computed once in
    forward and, unless it is kept, once more for each further reading: that of backward, and a second one in forward
    for the kinds and options that need it. Collectives are those of `divergence`, and in backward one reduction of the
    gradient of `student_hidden`, in fp32. With `sequence_parallel` both sequences are gathered in forward and the
    gradient is reduce-scattered instead.

    teacher_hidden, student_hidden   [..., D]; the two models' D may differ. With sequence_parallel this rank's
                     [S / ranks, ..., D] of the sequence dimension
    teacher_weight, student_weight   [V / ranks, D], dtypes of the hidden states; the same tensor twice is read once
    chunk_size       vocabulary columns at a time; default: as many as keep both models' logits at a fixed size
    logits_dtype     as in `linear_token_statistics`; the same for both models
    keep_bytes       of both models' logits, kept until backward; as in `linear_token_statistics`
    The other arguments and the errors are those of `divergence`.
    """
    for hidden, weight in ((teacher_hidden, teacher_weight), (student_hidden, student_weight)):
        check_operands(hidden, weight, chunk_size, logits_dtype, keep_bytes=keep_bytes)
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
    shard, top = Shard.of(student_weight.shape[0], group, vocab_size), check_top_k(top_k, top_k_of)
    method: _Whole | _TopK = _Whole(form, temperature)
    if top is not None:
        method = _TopK(form, temperature, top._replace(k=min(top.k, shard.vocab_size)))
    gathers = sequence_parallel and shard.ranks > 1
    if gathers and student_hidden.dim() < 2:
        raise ValueError(f"sequence_parallel needs hidden [S / ranks, ..., D], got {tuple(student_hidden.shape)}")
    tokens_shape = student_hidden.shape[:-1]
    if gathers:
        tokens_shape = torch.Size((student_hidden.shape[0] * shard.ranks, *student_hidden.shape[1:-1]))
    if logits_dtype is None:
        logits_dtype = torch.float32 if student_hidden.is_cuda else student_hidden.dtype
    learns = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    if not (learns or method.second_reading):
        keep_bytes = 0
    rows, device = 2 * tokens_shape.numel(), student_hidden.device
    chunk_size, kept = chunk_plan(device.type, rows, shard.columns, logits_dtype.itemsize, chunk_size, keep_bytes)
    results = _LinearDivergence.apply(
        teacher_hidden.detach(), teacher_weight.detach(), student_hidden, student_weight,
        teacher_weight is student_weight, shard, Chunks(rows, shard.columns, chunk_size, kept, logits_dtype, device),
        method, gathers,
    )  # fmt: skip
    value, teacher_entropy = (x.view(tokens_shape) for x in results)
    return Divergence(value, teacher_entropy)


def _logit_chunks(
    teacher_ND: torch.Tensor,
    teacher_weight_VD: torch.Tensor,
    student_ND: torch.Tensor,
    student_weight_VD: torch.Tensor,
    shared: bool,
    shard: Shard,
    chunks: Chunks,
) -> Iterator[tuple[slice, Shard, torch.Tensor, torch.Tensor]]:
    """Yield (columns, their shard, teacher's and student's logits [N, C]), which a last reading may overwrite."""
    tokens = student_ND.shape[0]
    both_ND = torch.cat([teacher_ND, student_ND]) if shared else None
    for columns, logits, computed in chunks:
        teacher_NC, student_NC = logits[:tokens], logits[tokens:]
        if not computed and both_ND is not None:
            project(both_ND, student_weight_VD[columns], logits)
        elif not computed:
            project(teacher_ND, teacher_weight_VD[columns], teacher_NC)
            project(student_ND, student_weight_VD[columns], student_NC)
        yield columns, shard.slice(columns.start, columns.stop), teacher_NC, student_NC


# One function for each reading: on return it drops its last views of the logits, before the next reading makes others.


class _Whole(NamedTuple):
    """The divergence over all columns."""

    form: Form
    temperature: float

    @property
    def second_reading(self) -> bool:
        """Return whether `value` reads all logits twice."""
        return self.form.second_reading

    def value(self, operands: tuple, plan: tuple) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the value [N], the teacher's entropy [N], and what `gradient` needs."""
        form, shard = self.form, plan[1]
        parts = gather_parts(self._first_reading(operands, plan), shard)
        scale_N5, value_N, entropy_N = pair_ops.combine(parts, self.temperature, form.student_first)
        if form.second_reading:
            part_N3 = self._second_reading(operands, plan, scale_N5)
            sums_N3, value_N = summed_entries(gather_parts(part_N3, shard), form)
        else:
            sums_N3 = plain_sums(value_N)
        return value_N, entropy_N, (scale_N5, sums_N3)

    def _first_reading(self, operands: tuple, plan: tuple) -> torch.Tensor:
        """Return the PairStatistics [N, 8] of this rank's columns."""
        part_N8, student_first = None, self.form.student_first
        for _, shard, teacher_NC, student_NC in _logit_chunks(*operands, *plan):
            pair = (student_NC, teacher_NC) if student_first else (teacher_NC, student_NC)
            chunk_N8 = pair_ops.statistics(*pair, shard, self.temperature, student_first)
            if part_N8 is not None:
                chunk_N8 = pair_ops.merge(torch.stack([part_N8, chunk_N8]), self.temperature)
            part_N8 = chunk_N8
        return part_N8

    def _second_reading(self, operands: tuple, plan: tuple, scale_N5: torch.Tensor) -> torch.Tensor:
        """Return the EntrySums [N, 3] of this rank's columns."""
        part_N3 = scale_N5.new_zeros((scale_N5.shape[0], 3))
        for _, shard, teacher_NC, student_NC in _logit_chunks(*operands, *plan):
            part_N3 += pair_ops.entry_sums(teacher_NC, student_NC, scale_N5, self.form, shard, self.temperature)
        return part_N3

    def gradient(self, saved, teacher_NC, student_NC, grad_value_N, shard: Shard) -> torch.Tensor:
        """Write the gradient of a chunk over the student's logits, and return it."""
        scale_N5, sums_N3 = saved
        return pair_ops.gradient(
            teacher_NC, student_NC, scale_N5, sums_N3, grad_value_N, self.form, shard, self.temperature, inplace=True
        )


class _TopK(NamedTuple):
    """The divergence of the k most probable columns and the rest as one."""

    form: Form
    temperature: float
    top: TopK

    @property
    def second_reading(self) -> bool:
        return False

    def value(self, operands: tuple, plan: tuple) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        parts = gather_parts(self._reading(operands, plan), plan[1])
        return top_k_ops.finish(parts, self.temperature, self.form, self.top)

    def _reading(self, operands: tuple, plan: tuple) -> torch.Tensor:
        """Return this rank's part [N, 8 + 3 k]."""
        part = None
        for _, shard, teacher_NC, student_NC in _logit_chunks(*operands, *plan):
            chunk = top_k_ops.part(teacher_NC, student_NC, shard, self.temperature, self.top)
            part = chunk if part is None else top_k_ops.merge(torch.stack([part, chunk]), self.top)
        return part

    def gradient(self, saved, teacher_NC, student_NC, grad_value_N, shard: Shard) -> torch.Tensor:
        found = top_k_ops.Coefficients(*saved)
        return top_k_ops.gradient(student_NC, found, grad_value_N, shard, self.temperature, inplace=True)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, teacher_hidden, teacher_weight_VD, student_hidden, student_weight_VD, shared, shard, chunks, method,
        gathers,
    ):  # fmt: skip
        hidden = [gather_sequence(x, shard) if gathers else x for x in (teacher_hidden, student_hidden)]
        teacher_ND, student_ND = (x.reshape(-1, x.shape[-1]) for x in hidden)
        operands = (teacher_ND, teacher_weight_VD, student_ND, student_weight_VD)
        plan = (shared, shard, chunks)
        value_N, entropy_N, saved = method.value(operands, plan)
        # The gathered sequences are kept, so that backward needs no second gather.
        ctx.save_for_backward(*operands, *saved)
        ctx.plan, ctx.method, ctx.gathers, ctx.hidden_shape = plan, method, gathers, student_hidden.shape
        ctx.mark_non_differentiable(entropy_N)
        return value_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value_N, _):
        operands, saved = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        _, _, student_ND, weight_VD = operands
        shared, shard, chunks = ctx.plan
        need_hidden, need_weight = ctx.needs_input_grad[2:4]
        grad_value_N = grad_value_N.float().contiguous()
        # Chunks add up in fp32: a bf16 sum over tens of chunks has an error that the reduction over ranks multiplies.
        grad_hidden_ND = torch.zeros_like(student_ND, dtype=torch.float32) if need_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if need_weight else None
        # The gradient overwrites the kept logits, so that a second backward pass must compute all of them.
        for columns, shard_of_chunk, teacher_NC, student_NC in _logit_chunks(*operands, shared, shard, chunks.take()):
            grad_NC = ctx.method.gradient(saved, teacher_NC, student_NC, grad_value_N, shard_of_chunk)
            grad_NC = grad_NC.to(student_ND.dtype)
            if need_hidden:
                grad_hidden_ND += grad_NC @ weight_VD[columns]
            if need_weight:
                torch.mm(grad_NC.t(), student_ND, out=grad_weight_VD[columns])
        grad_hidden = None
        if need_hidden:
            grad_hidden_ND = reduce_hidden(grad_hidden_ND, shard, ctx.gathers)
            grad_hidden = grad_hidden_ND.to(student_ND.dtype).view(ctx.hidden_shape)
        return None, None, grad_hidden, grad_weight_VD, *[None] * 5
