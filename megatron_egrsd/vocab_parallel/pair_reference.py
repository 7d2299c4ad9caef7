"""The kernels of two tensors of logits in plain torch: the fallback for the compiled ones. Same contract, slower.

The method is that of `csrc/common/divergence.h`, where the formulas stand. Everything is computed in fp64, in blocks of
rows, so that no form needs care against cancellation. The arguments are as in `pair_ops.py`, with logits [N, V].
"""

import math

import torch

from megatron_egrsd.vocab_parallel.reference import _row_blocks

FORWARD_KL, REVERSE_KL, JSD = range(3)  # the order of Kind in csrc/common/divergence.h


def statistics(first_NV: torch.Tensor, second_NV: torch.Tensor, valid: int, inverse_temperature: float) -> torch.Tensor:
    """Return the PairStatistics [N, 8] fp32 of each row's first `valid` columns."""
    out_N8 = first_NV.new_zeros((first_NV.shape[0], 8), dtype=torch.float32)
    out_N8[:, :2] = -math.inf
    for rows in _row_blocks(first_NV) if valid else []:
        out_N8[rows] = _block(first_NV[rows, :valid].double(), second_NV[rows, :valid].double(), inverse_temperature)
    return out_N8


def _block(t_NV: torch.Tensor, s_NV: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    peak_N1, other_N1 = t_NV.amax(-1, keepdim=True), s_NV.amax(-1, keepdim=True)
    empty_N1 = (peak_N1 == -math.inf) & (other_N1 == -math.inf)
    reference_N1 = peak_N1.where(peak_N1 > -math.inf, other_N1).masked_fill(empty_N1, 0.0)
    other_N1 = other_N1.where(other_N1 > -math.inf, reference_N1)
    y_NV = (t_NV - reference_N1) * inverse_temperature
    total_N1 = y_NV.exp().sum(-1, keepdim=True)
    other_total_N1 = ((s_NV - other_N1) * inverse_temperature).exp().sum(-1, keepdim=True)
    # The reference that makes the two sums equal, as far as fp32 holds it.
    equal_N1 = (other_N1 + (other_total_N1 / total_N1).log() / inverse_temperature).float().double()
    other_N1 = equal_N1.where(equal_N1.isfinite() | equal_N1.isnan(), other_N1)
    z_NV = (s_NV - other_N1) * inverse_temperature
    e_NV, f_NV = y_NV.exp(), z_NV.exp()
    w_NV = torch.where(y_NV == -math.inf, 0.0, y_NV - z_NV)
    weighted_NV = e_NV * w_NV
    sums = (
        e_NV, f_NV, weighted_NV, f_NV - e_NV + weighted_NV, _times_log(e_NV, y_NV), _times_log(f_NV, z_NV)
    )  # fmt: skip
    references = [x.masked_fill(empty_N1, -math.inf)[:, 0] for x in (reference_N1, other_N1)]
    return torch.stack([*references, *(x.sum(-1) for x in sums)], dim=-1).float()


def _times_log(p: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return torch.where(log_p == -math.inf, 0.0, p * log_p)


def merge(parts_RN8: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    """Merge PairStatistics of R disjoint parts into those of their union: [N, 8] fp64."""
    r_RN, other_RN, a_RN, b_RN, m_RN, g_RN, e_RN, f_RN = parts_RN8.double().unbind(-1)
    empty_RN = r_RN == -math.inf
    mass_RN, other_mass_RN = ~empty_RN & ~(a_RN == 0), ~empty_RN & ~(b_RN == 0)
    r_N = r_RN.where(mass_RN | ~mass_RN.any(0), -math.inf).amax(0)
    # The other reference is that of the part with more of p; f may not grow beyond all bounds.
    weight_RN = (a_RN.log() + (r_RN - r_N) * inverse_temperature).where(mass_RN & other_mass_RN, -math.inf)
    leader_1N = weight_RN.argmax(0, keepdim=True)
    other_N = r_N + (other_RN - r_RN).gather(0, leader_1N)[0]
    highest_N = other_RN.where(other_mass_RN, -math.inf).amax(0)
    led_N = weight_RN.isfinite().any(0) & ~((highest_N - other_N) * inverse_temperature > 6)
    other_N = other_N.where(led_N | (highest_N == -math.inf), highest_N).float().double()
    shift_RN = torch.where(mass_RN, (r_RN - r_N) * inverse_temperature, 0.0)
    other_shift_RN = torch.where(other_mass_RN, (other_RN - other_N) * inverse_temperature, 0.0)
    scale_RN, other_scale_RN, x_RN = shift_RN.exp(), other_shift_RN.exp(), other_shift_RN - shift_RN
    weighted_RN = scale_RN * (m_RN - x_RN * a_RN)
    near_RN = scale_RN * (x_RN.exp() * g_RN - x_RN.expm1() * m_RN + (x_RN.expm1() - x_RN) * a_RN)
    far_RN = other_scale_RN * b_RN - scale_RN * a_RN + weighted_RN
    sums = (
        scale_RN * a_RN, other_scale_RN * b_RN, weighted_RN, near_RN.where(x_RN.abs() < 0.5, far_RN),
        scale_RN * (e_RN + shift_RN * a_RN), other_scale_RN * (f_RN + other_shift_RN * b_RN),
    )  # fmt: skip
    all_empty_N = empty_RN.all(0)
    sums_N = [torch.where(empty_RN, 0.0, x).sum(0) for x in sums]
    references = [x.masked_fill(all_empty_N, -math.inf) for x in (r_N, other_N)]
    return torch.stack([*references, *sums_N], dim=-1)


def combine(
    parts_RN8: torch.Tensor, inverse_temperature: float, student_first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the PairScale [N, 5], KL(first || second) [N] and the teacher's entropy [N]; fp32."""
    r_N, other_N, a_N, b_N, m_N, g_N, e_N, f_N = merge(parts_RN8, inverse_temperature).unbind(-1)
    change_N = (g_N - m_N) / a_N
    near_N = g_N + m_N.abs() < 0.5 * a_N
    log_ratio_N = torch.where(near_N, -change_N.clamp(-0.5, 0.5).log1p(), (a_N / b_N).log())
    value_N = torch.where(near_N, g_N / a_N - (change_N + log_ratio_N), m_N / a_N - log_ratio_N)
    value_N = value_N.masked_fill(m_N == math.inf, math.inf).clamp_min(0.0)
    entropy_N = (b_N.log() - f_N / b_N if student_first else a_N.log() - e_N / a_N).clamp_min(0.0)
    # The other reference that makes the two sums equal, as far as fp32 holds it: log2(q / p) then keeps its digits.
    equal_N = (other_N - log_ratio_N / inverse_temperature).float().double()
    far_N = (log_ratio_N.abs() > 0.5) & log_ratio_N.isfinite()
    shift_N = torch.where(far_N, (equal_N - other_N) * inverse_temperature, 0.0)
    other_N = equal_N.where(far_N, other_N)
    log_ratio_N = log_ratio_N + shift_N
    scale = [r_N, other_N, 1 / a_N, (shift_N - b_N.log()).exp(), log_ratio_N * math.log2(math.e)]
    if student_first:
        scale = [scale[1], scale[0], scale[3], scale[2], -scale[4]]
    return torch.stack(scale, dim=-1).float(), value_N.float(), entropy_N.float()


def _probabilities(teacher_NV, student_NV, scale_N5, inverse_temperature):
    """Return p, q, u = ln(q / p) and q - p of a block of rows, fp64."""
    r, other, scale, other_scale, log_ratio = scale_N5.double()[:, :, None].unbind(1)
    y, z = (teacher_NV.double() - r) * inverse_temperature, (student_NV.double() - other) * inverse_temperature
    p, q = y.exp() * scale, z.exp() * other_scale
    u = torch.where((y == -math.inf) & (z == -math.inf), 0.0, z - y + log_ratio * math.log(2.0))
    difference = torch.where(u < 0, p * u.expm1(), -q * (-u).expm1())
    return p, q, u, difference


def _entries(p, q, u, difference, kind: int, beta: float):
    """Return each column's entry, what it adds to the value beyond first-order terms that sum to zero, and the log."""
    if kind == FORWARD_KL:
        entry = torch.where(p > 0, -p * u, 0.0)
        return entry, entry + difference, u
    if kind == REVERSE_KL:
        entry = torch.where(q > 0, q * u, 0.0)
        return entry, entry - difference, u
    base, other, share = torch.where(u < 0, p, q), torch.where(u < 0, q, p), torch.where(u < 0, 1 - beta, beta)
    u_small = -u.abs()
    x = share * u_small.expm1()
    log_m = x.log1p()  # of m over the larger one
    entry = share * _times_log(other, u_small.clamp_min(-1e300)) - base * (1 + x) * log_m
    return entry, entry, torch.where(u < 0, u, 0.0) - log_m


def entry_sums(
    teacher_NV, student_NV, scale_N5, kind: int, limit: float, beta: float, valid: int, inverse_temperature: float
) -> torch.Tensor:
    """Return the EntrySums [N, 3] fp32 of each row's first `valid` columns."""
    out_N3 = scale_N5.new_zeros((scale_N5.shape[0], 3))
    for rows in _row_blocks(teacher_NV) if valid else []:
        block = teacher_NV[rows, :valid], student_NV[rows, :valid], scale_N5[rows], inverse_temperature
        p, q, u, difference = _probabilities(*block)
        entry, beyond, log = _entries(p, q, u, difference, kind, beta)
        clipped = entry > limit
        first_order = {FORWARD_KL: difference, REVERSE_KL: -difference, JSD: torch.zeros_like(difference)}[kind]
        value = torch.where(clipped, limit + first_order, beyond) if limit < math.inf else beyond
        mass = torch.where(clipped, p if kind == FORWARD_KL else q, 0.0) if kind != JSD else q
        slope = torch.where(clipped | (q == 0), 0.0, q * log) if kind != FORWARD_KL else torch.zeros_like(q)
        sums = value, mass, slope
        out_N3[rows] = torch.stack([x.sum(-1) for x in sums], dim=-1).float()
    return out_N3


def gradient(
    teacher_NV, student_NV, grad_NV, scale_N5, sums_N3, grad_value_N, kind: int, limit: float, beta: float, valid: int,
    inverse_temperature: float,
) -> None:  # fmt: skip
    """Write the gradient with respect to the student's logits to `grad_NV`, which may be they. Padding gets zeros."""
    for rows in _row_blocks(teacher_NV) if valid else []:
        block = teacher_NV[rows, :valid], student_NV[rows, :valid], scale_N5[rows], inverse_temperature
        p, q, u, difference = _probabilities(*block)
        entry, _, log = _entries(p, q, u, difference, kind, beta)
        _, mass, slope = sums_N3[rows].double()[:, :, None].unbind(1)
        if kind == FORWARD_KL:
            below, above = difference - q * mass, q * (1 - mass)
        elif kind == REVERSE_KL:
            log = torch.where(q > 0, log, 0.0)
            below, above = q * (log - slope + mass), q * (mass - slope - 1)
        else:
            log = torch.where(q > 0, log, 0.0)
            slope = slope / mass
            below, above = (1 - beta) * q * (log - slope), (beta - 1) * q * slope
        block_NV = torch.where(entry > limit, above, below) * (grad_value_N[rows, None] * inverse_temperature)
        grad_NV[rows, :valid] = block_NV.to(grad_NV.dtype)
    grad_NV[:, valid:] = 0
