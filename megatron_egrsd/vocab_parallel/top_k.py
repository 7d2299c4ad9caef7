"""The divergence of the k most probable columns, and of all others as one column (SDPO).

`part` reads the logits of one part of the vocabulary, a shard or a chunk, once; parts merge, and `finish` makes the
value and the gradient's coefficients of their union. `gradient` then needs the student's logits of a part alone.
"""

import math
from typing import NamedTuple

import torch

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts
from megatron_egrsd.vocab_parallel.form import TopK
from megatron_egrsd.vocab_parallel.pair_ops import Form
from megatron_egrsd.vocab_parallel.shard import Shard

_SMALLEST_TAIL = 1e-7  # the resolution of a normalised fp32 probability
_IMPOSSIBLE = -1e4  # its exponential is 0 in fp64


class Coefficients(NamedTuple):
    """Coefficients of the gradient: of a column j outside the k it is -q_j C, of column j among them c_j - q_j C.

    c_j is the derivative of the value with respect to ln q_j, the rest's probability being a function of all of them,
    and C is the sum of all c_j.
    """

    statistics_N4: torch.Tensor  # the student's, of the whole vocabulary
    total_N: torch.Tensor  # C
    among_Nk: torch.Tensor  # c_j - q_j C
    ids_Nk: torch.Tensor  # the k columns, int32


def part(teacher: torch.Tensor, student: torch.Tensor, shard: Shard, temperature: float, top: TopK) -> torch.Tensor:
    """Return one part's [N, 8 + 3 k] fp32: statistics of both models, and the k columns that may be the top k.

    Of each column both logits and the id's bits; -inf and -1 if the part has fewer columns.
    """
    statistics = [ops.statistics(logits, None, shard, temperature) for logits in (teacher, student)]
    rows, held = student.shape[:-1].numel(), min(top.k, shard.valid)
    columns_3Nk = torch.full((3, rows, top.k), -math.inf, dtype=torch.float32, device=student.device)
    columns_3Nk[2] = torch.full((), -1, dtype=torch.int32, device=student.device).view(torch.float32)
    if held:
        chosen = student if top.of == "student" else teacher
        place = chosen[..., : shard.valid].topk(held, dim=-1).indices
        for i, logits in enumerate((teacher, student)):
            columns_3Nk[i, :, :held] = logits.gather(-1, place).reshape(rows, held)
        columns_3Nk[2, :, :held] = (place.reshape(rows, held) + shard.start).int().view(torch.float32)
    return torch.cat([*statistics, *columns_3Nk], dim=-1)


def merge(parts: torch.Tensor, top: TopK) -> torch.Tensor:
    """Merge R disjoint parts [R, N, 8 + 3 k] into one [N, 8 + 3 k]."""
    statistics, _, columns_N3k = _union(parts, top)
    rows = parts.shape[1]
    return torch.cat([statistics[:rows], statistics[rows:], columns_N3k.flatten(1)], dim=-1)


def _union(parts: torch.Tensor, top: TopK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the statistics [2 N, 4] of teacher and student, their entropies [2 N], and the top k columns [N, 3, k]."""
    statistics, _, entropy, _ = ops.combine(torch.cat([parts[..., :4], parts[..., 4:8]], dim=1))
    columns_N3K = parts[..., 8:].unflatten(-1, (3, top.k)).permute(1, 2, 0, 3).flatten(2)
    place_Nk = columns_N3K[:, 1 if top.of == "student" else 0].topk(top.k, dim=-1).indices
    return statistics, entropy, columns_N3K.gather(2, place_Nk[:, None].expand(-1, 3, -1))


def finish(
    parts: torch.Tensor, temperature: float, form: Form, top: TopK
) -> tuple[torch.Tensor, torch.Tensor, Coefficients]:
    """Return the value [N] and the teacher's entropy [N] of the whole vocabulary, and the gradient's coefficients."""
    statistics, entropy, columns_N3k = _union(parts, top)
    rows = parts.shape[1]
    reference, total = statistics[:, 0].double(), statistics[:, 1].double()
    log_z_T, log_z_S = (reference * math.log(2.0) + total.log()).view(2, rows, 1)
    log_p = columns_N3k[:, 0].double() / temperature - log_z_T
    log_q = columns_N3k[:, 1].double() / temperature - log_z_S
    with torch.enable_grad():
        log_q.requires_grad_()
        value_N = _value(_with_tail(log_p), _with_tail(log_q), form)
        slope_Nk = torch.autograd.grad(value_N.sum(), log_q)[0]
    total_N1 = slope_Nk.sum(-1, keepdim=True)
    among_Nk = slope_Nk - log_q.detach().exp() * total_N1
    ids_Nk = columns_N3k[:, 2].contiguous().view(torch.int32)
    found = Coefficients(statistics[rows:], total_N1[:, 0].float(), among_Nk.float(), ids_Nk)
    return value_N.detach().float(), entropy[:rows].clone(), found


def _with_tail(log_p_Nk: torch.Tensor) -> torch.Tensor:
    finite_Nk = log_p_Nk.clamp_min(_IMPOSSIBLE)  # of -inf alone the gradient is not a number
    log_sum_N1 = finite_Nk.logsumexp(-1, keepdim=True).clamp_max(-_SMALLEST_TAIL)
    return torch.cat([log_p_Nk, (-log_sum_N1.expm1()).log()], dim=-1)


def _value(log_p: torch.Tensor, log_q: torch.Tensor, form: Form) -> torch.Tensor:
    """Return the divergence of two distributions over the last dimension, fp64, from their logarithms."""

    def kl(a, b):
        possible = a != -math.inf  # of other entries neither value nor gradient
        a, b = a.where(possible, 0.0), b.where(possible, 0.0)
        return a.exp() * (a - b)

    if form.kind == "forward_kl":
        entries = kl(log_p, log_q)
    elif form.kind == "reverse_kl":
        entries = kl(log_q, log_p)
    else:
        either = (log_p != -math.inf) | (log_q != -math.inf)
        parts = log_p + math.log(form.beta), log_q + math.log1p(-form.beta)
        log_m = torch.logaddexp(*(part.where(either, 0.0) for part in parts))
        entries = form.beta * kl(log_p, log_m) + (1 - form.beta) * kl(log_q, log_m)
    return entries.clamp_max(form.limit).sum(-1)


def gradient(
    student: torch.Tensor,
    found: Coefficients,
    grad_value_N: torch.Tensor,
    shard: Shard,
    temperature: float,
    *,
    inplace: bool,
) -> torch.Tensor:
    """Return the gradient with respect to the student's logits of a part; `inplace` writes it over them."""
    gradients = ops.Gradients(None, None, (-found.total_N * grad_value_N).float())
    grad = ops.logits_grad(student, None, found.statistics_N4, gradients, shard, temperature, inplace=inplace)
    column_Nk = found.ids_Nk.long() - shard.start
    held_Nk = (column_Nk >= 0) & (column_Nk < shard.valid)
    column_Nk.masked_fill_(~held_Nk, 0)
    among_Nk = found.among_Nk * (grad_value_N / temperature)[:, None]
    # An id that this part does not hold writes again what belongs into one column that it does, or into the first.
    first_N1 = held_Nk.int().argmax(-1, keepdim=True)
    spare_N1, any_N1 = column_Nk.gather(1, first_N1), held_Nk.any(-1, keepdim=True)
    shape = grad.shape[:-1]
    own_N1 = grad.gather(-1, spare_N1.view(*shape, 1)).reshape(-1, 1).float()
    kept_N1 = among_Nk.gather(1, first_N1).where(any_N1, own_N1)
    column_Nk, among_Nk = column_Nk.where(held_Nk, spare_N1), among_Nk.where(held_Nk, kept_N1)
    of_shape = (*shape, column_Nk.shape[-1])  # not -1: maybe no tokens
    grad.scatter_(-1, column_Nk.view(of_shape), among_Nk.to(grad.dtype).view(of_shape))
    return grad


class TopKDivergence(torch.autograd.Function):
    """Value [N] and the teacher's entropy [N] from the logits of a shard; the arguments are checked."""

    @staticmethod
    def forward(ctx, teacher, student, shard, temperature, form, top, inplace):
        own = part(teacher, student, shard, temperature, top)
        value_N, entropy_N, found = finish(gather_parts(own, shard), temperature, form, top)
        ctx.save_for_backward(student, *found)
        ctx.shard, ctx.temperature, ctx.inplace = shard, temperature, inplace
        ctx.mark_non_differentiable(entropy_N)
        return value_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value_N, _):
        student, *found = ctx.saved_tensors
        grad = gradient(
            student, Coefficients(*found), grad_value_N, ctx.shard, ctx.temperature, inplace=ctx.inplace
        )  # fmt: skip
        return None, grad, *[None] * 5
