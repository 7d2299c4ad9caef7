"""The divergence of the k most probable columns, and of all others as one column (SDPO)."""

import math

import torch

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts
from megatron_egrsd.vocab_parallel.pair_ops import Form
from megatron_egrsd.vocab_parallel.shard import Shard

_SMALLEST_TAIL = 1e-7  # the resolution of a normalised fp32 probability


def top_k_divergence(
    teacher: torch.Tensor,
    student: torch.Tensor,
    shard: Shard,
    temperature: float,
    form: Form,
    k: int,
    of: str,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value [N] and the teacher's entropy [N]; the arguments are those of `divergence`, checked."""
    return _TopK.apply(teacher, student, shard, temperature, form, min(k, shard.vocab_size), of, inplace)


def _most_probable(logits: torch.Tensor, shard: Shard, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this shard's k highest logits [N, k] fp32 and their global ids; -inf and -1 if it has fewer columns."""
    rows = logits.shape[:-1].numel()
    values_Nk = torch.full((rows, k), -math.inf, dtype=torch.float32, device=logits.device)
    ids_Nk = torch.full((rows, k), -1, dtype=torch.int64, device=logits.device)
    held = min(k, shard.valid)
    if held:
        values, ids = logits[..., : shard.valid].topk(held, dim=-1)
        values_Nk[:, :held] = values.reshape(rows, held).float()
        ids_Nk[:, :held] = ids.reshape(rows, held) + shard.start
    return values_Nk, ids_Nk


def _columns(ids_Nk: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of the ids this shard holds, and their columns (0 for the others)."""
    column_Nk = ids_Nk - shard.start
    held_Nk = (column_Nk >= 0) & (column_Nk < shard.valid)
    return held_Nk, column_Nk.where(held_Nk, 0)


def _gather_columns(logits: torch.Tensor, column_Nk: torch.Tensor) -> torch.Tensor:
    """Return the logits [N, k] fp32 in the given columns."""
    return logits.gather(-1, column_Nk.view(*logits.shape[:-1], column_Nk.shape[-1])).reshape(column_Nk.shape).float()


def _with_tail(log_p_Nk: torch.Tensor) -> torch.Tensor:
    log_sum_N1 = log_p_Nk.logsumexp(-1, keepdim=True).clamp_max(-_SMALLEST_TAIL)
    return torch.cat([log_p_Nk, (-log_sum_N1.expm1()).log()], dim=-1)


def _value(log_p: torch.Tensor, log_q: torch.Tensor, form: Form) -> torch.Tensor:
    """Return the divergence of two distributions over the last dimension, fp64, from their logarithms."""

    def kl(a, b):
        return torch.where(a == -math.inf, 0.0, a.exp() * (a - b))

    if form.kind == "forward_kl":
        entries = kl(log_p, log_q)
    elif form.kind == "reverse_kl":
        entries = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(form.beta), log_q + math.log1p(-form.beta))
        entries = form.beta * kl(log_p, log_m) + (1 - form.beta) * kl(log_q, log_m)
    return entries.clamp_max(form.limit).sum(-1)


class _TopK(torch.autograd.Function):
    """The gradient of a column j outside the k is -q_j C, of column j among them c_j - q_j C.

    c_j is the derivative of the value with respect to ln q_j, the rest's probability being a function of all of them,
    and C is the sum of all c_j.
    """

    @staticmethod
    def forward(ctx, teacher, student, shard, temperature, form, k, of, inplace):
        parts = [ops.statistics(logits, None, shard, temperature) for logits in (teacher, student)]
        chosen, other = (student, teacher) if of == "student" else (teacher, student)
        values_Nk, ids_Nk = _most_probable(chosen, shard, k)
        packed = torch.cat([*parts, values_Nk, ids_Nk.int().view(torch.float32)], dim=-1)  # an id's bits, as a float
        gathered = gather_parts(packed, shard)
        rows = packed.shape[0]
        statistics, _, entropy, _ = ops.combine(torch.cat([gathered[..., :4], gathered[..., 4:8]], dim=1))
        values_NK = gathered[..., 8 : 8 + k].movedim(0, 1).flatten(1)
        ids_NK = gathered[..., 8 + k :].contiguous().view(torch.int32).movedim(0, 1).flatten(1)
        values_Nk, place_Nk = values_NK.topk(k, dim=-1)
        ids_Nk = ids_NK.gather(1, place_Nk).long()
        held_Nk, column_Nk = _columns(ids_Nk, shard)
        others = _gather_columns(other, column_Nk).masked_fill(~held_Nk, -math.inf)
        others_Nk = gather_parts(others, shard).amax(0)
        student_Nk, teacher_Nk = (values_Nk, others_Nk) if of == "student" else (others_Nk, values_Nk)
        reference, total = statistics[:, 0].double(), statistics[:, 1].double()
        log_z_T, log_z_S = (reference * math.log(2.0) + total.log()).view(2, rows, 1)
        log_p = teacher_Nk.double() / temperature - log_z_T
        log_q = student_Nk.double() / temperature - log_z_S
        with torch.enable_grad():
            log_q.requires_grad_()
            value_N = _value(_with_tail(log_p), _with_tail(log_q), form)
            slope_Nk = torch.autograd.grad(value_N.sum(), log_q)[0]
        ctx.save_for_backward(student, statistics[rows:], slope_Nk, log_q.detach(), ids_Nk)
        ctx.shard, ctx.temperature, ctx.inplace = shard, temperature, inplace
        entropy_N = entropy[:rows].clone()
        ctx.mark_non_differentiable(entropy_N)
        return value_N.detach().float(), entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value_N, _):
        student, statistics_N4, slope_Nk, log_q_Nk, ids_Nk = ctx.saved_tensors
        shard, temperature = ctx.shard, ctx.temperature
        total_N1 = slope_Nk.sum(-1, keepdim=True)
        gradients = ops.Gradients(None, None, (-total_N1[:, 0] * grad_value_N).float())
        grad = ops.logits_grad(student, None, statistics_N4, gradients, shard, temperature, inplace=ctx.inplace)
        held_Nk, column_Nk = _columns(ids_Nk, shard)
        among_Nk = ((slope_Nk - log_q_Nk.exp() * total_N1) * grad_value_N[:, None] / temperature).float()
        # An id that this shard does not hold writes again what belongs into one column that it does, or into the first.
        first_N1 = held_Nk.int().argmax(-1, keepdim=True)
        spare_N1 = column_Nk.gather(1, first_N1)
        any_N1 = held_Nk.any(-1, keepdim=True)
        kept_N1 = among_Nk.gather(1, first_N1).where(any_N1, _gather_columns(grad, spare_N1))
        column_Nk, among_Nk = column_Nk.where(held_Nk, spare_N1), among_Nk.where(held_Nk, kept_N1)
        shape = (*grad.shape[:-1], ids_Nk.shape[-1])
        grad.scatter_(-1, column_Nk.view(shape), among_Nk.to(grad.dtype).view(shape))
        return None, grad, *[None] * 6
