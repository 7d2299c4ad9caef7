"""The divergence of two models' distributions over a sharded vocabulary, exact, without holding either of them."""

from typing import Any, NamedTuple

import torch

from megatron_egrsd.vocab_parallel import pair_ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts
from megatron_egrsd.vocab_parallel.form import check_form, check_top_k
from megatron_egrsd.vocab_parallel.pair_ops import Form
from megatron_egrsd.vocab_parallel.rows import overlap
from megatron_egrsd.vocab_parallel.shard import Shard, check_logits, prepare_temperature
from megatron_egrsd.vocab_parallel.top_k import TopKDivergence


class Divergence(NamedTuple):
    """Results of `divergence`, each [...] fp32 in nats."""

    value: torch.Tensor
    teacher_entropy: torch.Tensor


@torch.compiler.disable
def divergence(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    *,
    kind: str,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    beta: float = 0.5,
    top_k: int | None = None,
    top_k_of: str = "student",
    inplace_backward: bool = False,
) -> Divergence:
    """Compute a divergence of p = softmax(teacher / temperature) and q = softmax(student / temperature) per token.

    The value has a gradient with respect to the student's logits, and the teacher's entropy has none. The teacher is a
    constant. Extra memory is proportional to the tokens; backward reads both tensors and writes one, without a
    collective. Costs of forward:

    | kind, options              | value                                  | reads of both | gathers, floats a token |
    |----------------------------|----------------------------------------|---------------|-------------------------|
    | forward_kl                 | sum p ln(p / q)                        | 1             | 1 of 8                  |
    | reverse_kl                 | sum q ln(q / p)                        | 1             | 1 of 8                  |
    | jsd                        | beta KL(p, m) + (1 - beta) KL(q, m)    | 2             | 8, then 3               |
    | any of them, entry_clip    | each column's entry limited from above | 2             | 8, then 3               |
    | any of them, top_k         | of k columns and the rest as one       | 1, and top-k  | 1 of 8 + 3 k            |

    m = beta p + (1 - beta) q, as in arXiv 2306.13649 (GKD), TRL and SDPO; beta must be between 0 and 1, both excluded.

    teacher_logits   [..., V / ranks], fp32, bf16 or fp16, rows contiguous: this rank's columns
    student_logits   the same shape, dtype and device. Equal logits give exactly 0, in the value and in the gradient
    group, vocab_size   as in `token_statistics`: padded columns take part in nothing and get a zero gradient
    entry_clip       an entry, p ln(p / q) of forward_kl for example, above this many nats counts as this many, without
                     a gradient (OPSD's published code: 0.05)
    top_k            the k most probable columns of `top_k_of` ("student" as in SDPO, or "teacher"), and one that holds
                     the probability of all others: one minus theirs, right to 1e-7 and at least that
    inplace_backward backward writes the gradient over the student's logits; a later use of them in autograd raises

    Raises ValueError on a bad shape, dtype, stride, vocab_size, temperature, kind or option.
    """
    shard = check_pair(teacher_logits, student_logits, group, vocab_size)
    form, top = check_form(kind, entry_clip, beta), check_top_k(top_k, top_k_of)
    temperature = check_temperature(temperature)
    if inplace_backward and overlap(student_logits):
        raise ValueError(
            f"inplace_backward needs student_logits whose rows do not overlap, got strides {student_logits.stride()}"
        )
    teacher_logits = teacher_logits.detach()
    if top is None:
        results = _Divergence.apply(teacher_logits, student_logits, shard, temperature, form, inplace_backward)
    else:
        top = top._replace(k=min(top.k, shard.vocab_size))
        results = TopKDivergence.apply(teacher_logits, student_logits, shard, temperature, form, top, inplace_backward)
    value, teacher_entropy = (x.view(student_logits.shape[:-1]) for x in results)
    return Divergence(value, teacher_entropy)


def check_pair(teacher: torch.Tensor, student: torch.Tensor, group: Any, vocab_size: int | None) -> Shard:
    """Return the shard of two tensors of logits; raises ValueError unless they have one shape, dtype and device."""
    check_logits("teacher_logits", teacher)
    check_logits("student_logits", student)
    if teacher.shape != student.shape or teacher.device != student.device or teacher.dtype != student.dtype:
        raise ValueError(
            f"teacher_logits {teacher.dtype} {tuple(teacher.shape)} on {teacher.device} and student_logits "
            f"{student.dtype} {tuple(student.shape)} on {student.device} must have one shape, dtype and device"
        )
    return Shard.of(student.shape[-1], group, vocab_size)


def check_temperature(temperature: float) -> float:
    """Return `temperature`; raises ValueError unless it is a number above zero."""
    if isinstance(temperature, torch.Tensor):
        raise ValueError("temperature must be a number here, not a tensor")
    return prepare_temperature(temperature, torch.Size())


def plain_sums(value_N: torch.Tensor) -> torch.Tensor:
    """Return the EntrySums [N, 3] of a divergence of one reading: no entry is clipped, and the slope is the value."""
    return torch.stack([value_N, torch.zeros_like(value_N), value_N], dim=-1)


def summed_entries(parts_RN3: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the EntrySums [N, 3] of the whole vocabulary and the value [N]."""
    sums_N3 = parts_RN3.sum(0)
    value_N = sums_N3[:, 0].clone()
    return sums_N3, value_N.clamp_min_(0.0) if form.kind == "jsd" else value_N


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, student, shard, temperature, form, inplace):
        first, second = (student, teacher) if form.student_first else (teacher, student)
        part_N8 = pair_ops.statistics(first, second, shard, temperature, form.student_first)
        scale_N5, value_N, entropy_N = pair_ops.combine(gather_parts(part_N8, shard), temperature, form.student_first)
        if form.second_reading:
            part_N3 = pair_ops.entry_sums(teacher, student, scale_N5, form, shard, temperature)
            sums_N3, value_N = summed_entries(gather_parts(part_N3, shard), form)
        else:
            sums_N3 = plain_sums(value_N)
        ctx.save_for_backward(teacher, student, scale_N5, sums_N3)
        ctx.shard, ctx.temperature, ctx.form, ctx.inplace = shard, temperature, form, inplace
        ctx.mark_non_differentiable(entropy_N)
        return value_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value_N, _):
        teacher, student, scale_N5, sums_N3 = ctx.saved_tensors
        grad = pair_ops.gradient(
            teacher, student, scale_N5, sums_N3, grad_value_N.float().contiguous(), ctx.form, ctx.shard,
            ctx.temperature, inplace=ctx.inplace,
        )  # fmt: skip
        return None, grad, None, None, None, None
