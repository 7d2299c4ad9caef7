"""Divergences by definition in fp64, and pairs of rows that are hard for a kernel."""

import math

import torch

FLOOR = -1e9  # a logit of -inf as a number, so that autograd can pass it
GAP = 7.0  # what stands between the rows of `with_gaps`
FORMS = {
    "forward": dict(kind="forward_kl"),
    "reverse": dict(kind="reverse_kl"),
    "jsd": dict(kind="jsd"),
    "jsd 0.1": dict(kind="jsd", beta=0.1),
    "forward clipped": dict(kind="forward_kl", entry_clip=0.05),
    "reverse clipped": dict(kind="reverse_kl", entry_clip=0.05),
    "jsd clipped": dict(kind="jsd", entry_clip=0.002),
    "top 5": dict(kind="jsd", top_k=5),
    "top 5 forward of the teacher": dict(kind="forward_kl", top_k=5, top_k_of="teacher"),
    "top 5 reverse": dict(kind="reverse_kl", top_k=5),
}
FULL = [name for name in FORMS if "top" not in name]


def entries(log_p, log_q, kind, beta):
    if kind == "forward_kl":
        return log_p.exp() * (log_p - log_q)
    if kind == "reverse_kl":
        return log_q.exp() * (log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def with_tail(log_p, ids):
    chosen = log_p.gather(-1, ids)
    rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest.clamp_min(math.log(1e-7))], dim=-1)


def fp64(
    teacher, student, grad_value, *, kind, beta=0.5, entry_clip=None, top_k=None, top_k_of="student", vocab_size=None,
    temperature=1.0,
):  # fmt: skip
    """Return (value, teacher's entropy, gradient of the student's logits, whether the value is infinite)."""
    t, s = teacher[..., :vocab_size].double(), student.detach()[..., :vocab_size].double()
    no_p, no_q = t == -math.inf, s == -math.inf
    t, s = t.clamp_min(FLOOR), s.clamp_min(FLOOR).requires_grad_()
    log_p, log_q = (t / temperature).log_softmax(-1), (s / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    infinite = {"forward_kl": no_q & ~no_p, "reverse_kl": no_p & ~no_q}.get(kind, torch.zeros_like(no_p))
    if top_k is None:
        each = entries(log_p, log_q, kind, beta)
    else:
        ids = (t if top_k_of == "teacher" else s.detach()).topk(top_k, dim=-1).indices
        each = entries(with_tail(log_p, ids), with_tail(log_q, ids), kind, beta)
        infinite = infinite[..., :0]
    if entry_clip is not None:
        each = torch.where(infinite, torch.full_like(each, entry_clip), each) if top_k is None else each
        each, infinite = each.clamp(max=entry_clip), infinite[..., :0]
    value = each.sum(-1)
    (value * grad_value).sum().backward()
    gradient = torch.zeros_like(student, dtype=torch.float64)
    gradient[..., :vocab_size] = s.grad
    infinite = infinite.any(-1)
    return value.detach().masked_fill(infinite, math.inf), entropy, gradient, infinite


def hard_pairs(vocab: int, rows: int = 6) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, rows, vocab, generator=g)
    one_hot = torch.full((2, rows, vocab), -30.0)
    for of, shift in enumerate((0, vocab // 2)):
        one_hot[of, torch.arange(rows), (torch.arange(rows) + shift) % vocab] = 30.0
    masked = torch.where(torch.rand(rows, vocab, generator=g) < 0.5, -math.inf, a * 3)
    masked[:, vocab // 3] = 1.0
    late = torch.linspace(0, 12, vocab)
    few = torch.arange(0, vocab // 2 + 1, max(vocab // 12, 1))  # all in the first half, but perhaps one
    outside = torch.ones(vocab, dtype=torch.bool).index_fill(0, few, False)
    steep = b.index_fill(-1, few[1:2], -50.0).index_fill(-1, few[:1], 3.0)  # against a column that the teacher has
    first = torch.arange(vocab) < vocab // 2
    return {
        "independent": (a * 3, b * 3),
        "flat": (a * 0.01, b * 0.01),
        "apart by 0.1": (a * 3, a * 3 + b * 0.1),
        "all negative": (-a.abs() * 5 - 40, -b.abs() * 5 - 400),
        "offset": (a + 100, b - 100),
        "constant": (torch.full((rows, vocab), 7.25), torch.full((rows, vocab), -3.0)),
        "one-hot": (one_hot[0], one_hot[1]),
        "range 1e4": (a * 1e4, b * 1e4),
        "teacher masked": (masked, a),
        "student masked": (a, masked),
        "teacher masked at first": (a.masked_fill(first, -math.inf), b + 30),
        "student masked at first": (a + 300, b.masked_fill(first, -math.inf)),
        "teacher of few columns": (a.masked_fill(outside, -math.inf), steep),
        "teacher at -100 but for few columns": (a.masked_fill(outside, -100.0), steep),
        "both masked": (masked, masked + torch.where(masked > -math.inf, b * 0.01, 0.0)),
        "rising": (a.sort(-1).values * 40, b.sort(-1).values * 40),
        "against each other": (a.sort(-1).values * 40, -b.sort(-1).values * 40),
        "the mass comes late": (a * 3 + late, a * 3 + late + b * (0.3 - 0.02 * late)),
    }


def near_pairs(vocab: int, rows: int = 4) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs whose KL divergence is about 1e-9, with and without an offset between the two models' logits."""
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, rows, vocab, generator=g)
    late = torch.where(torch.arange(vocab) < vocab // 2, 0.0, 9.0)
    step = torch.where(torch.arange(vocab) < vocab // 2, 0.2, 0.0)
    near = a * 3 + b * 4.5e-5
    return {
        "plain": (a * 3, near),
        "student 100 higher": (a * 3, near + 100),
        "teacher 100 higher": (a * 3 + 100, near),
        "student 10 lower": (a * 3, near - 10),
        "both at 300": (a * 3 + 300, near + 300),
        "first half lighter": (a * 3 + late * 3, a * 3 + late * 3 + b * 4.5e-5 + step * 1e-4),
    }


def with_gaps(leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a buffer, and logits within it that autograd made of `leaf` [N, V]: their rows are apart and unaligned."""
    buffer = leaf.new_full((leaf.shape[0], leaf.shape[1] + 10), GAP)
    logits = buffer[:, 1:-9]
    logits.copy_(leaf)
    return buffer, logits
