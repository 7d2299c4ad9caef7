"""Time of exact divergences of two models: ours, the leanest eager form, torch.compile of it, and peers' functions.

    python -m benchmarks.divergence --device cpu --threads 1

Prints Markdown tables, of one tensor-parallel rank: [N, V] logits of two models to a value per token, our gradient
written over the student's logits, and JSD behind the LM head, from hidden states to gradients. The entries run in turn,
so that a change of the machine's load meets all of them; the numbers are medians. The floor, measured in the same
rounds, is the time to read both tensors once; the gradient's also writes one.

TRL's, Liger's and NeMo-RL's own functions are called if their packages can be imported, and left out if not.
`gkd_jsd`, which torch.compile gets, is GKD's generalised JSD, written by us from its formula.
"""

import argparse
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.measure import load, table
from benchmarks.vocab_parallel import floors, interleaved, machine, peak_extra_bytes, running
from megatron_egrsd.vocab_parallel import divergence, linear_divergence, pair_ops
from megatron_egrsd.vocab_parallel.shard import Shard

DTYPES = (torch.bfloat16, torch.float32)
READ, WRITE, OURS = "floor: read both once", "floor: read both, write one", "ours, forward_kl"


def eager_forward_kl(teacher, student):
    """Return KL(p || q) from one exponential of each, in place if possible; it loses digits of a small divergence."""
    t, s = teacher.float(), student.float()
    t = t - t.amax(-1, keepdim=True)
    s = s - s.amax(-1, keepdim=True)
    e = t.exp()
    total = e.sum(-1)
    return e.mul_(t - s).sum(-1) / total - total.log() + s.exp().sum(-1).log()


def gkd_jsd(teacher, student, beta=0.5):
    log_p, log_q = F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1)
    weights = torch.tensor([beta, 1 - beta], dtype=log_p.dtype).log().to(log_p.device)
    log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
    forward = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    backward = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (beta * forward + (1 - beta) * backward).sum(-1)


def peers(teacher, student) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what other projects compute of [N, V] logits, by their own functions."""

    def trl():
        from trl.experimental.gkd import GKDTrainer

        return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], reduction="sum")

    def liger():
        return liger_jsd().LigerFusedLinearJSDFunction.distillation_loss_fn(student, teacher)

    def nemo_rl():
        from nemo_rl.algorithms.loss.loss_functions import CrossTokenizerDistillationLossFn as Loss

        loss = SimpleNamespace(temperature=1.0, reverse_kl=False, _same_vocab_masked_kl=lambda kl, *_: kl.sum())
        return Loss._direct_full_vocab_kl(loss, student, teacher, None, None, tp_group=None, cp_group=None)

    return {"TRL's JSD (GKD)": trl, "Liger's JSD (chunked loss)": liger, "NeMo-RL's forward KL": nemo_rl}


def liger_jsd():
    """Return Liger's JSD of chunked logits, in torch. Raises ImportError if liger-kernel is not installed."""
    from liger_kernel.chunked_loss import jsd_loss

    return jsd_loss


def logits_of_two(n: int, v: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    g = torch.Generator(device=device).manual_seed(0)
    return [(torch.randn(n, v, generator=g, device=device) * 3).to(dtype) for _ in range(2)]


def compare(n: int, v: int, dtype: torch.dtype, device: str, rounds: int, compiled: bool) -> dict[str, list[float]]:
    """Return the seconds of each entry's forward pass."""
    teacher, student = logits_of_two(n, v, dtype, device)
    both = [floors(x, device)[0] for x in (teacher, student)]
    entries = {
        READ: lambda: [read() for read in both],
        OURS: lambda: divergence(teacher, student, kind="forward_kl"),
        "ours, reverse_kl": lambda: divergence(teacher, student, kind="reverse_kl"),
        "ours, jsd (two readings)": lambda: divergence(teacher, student, kind="jsd"),
        "ours, forward_kl with clipped entries (two readings)": lambda: divergence(
            teacher, student, kind="forward_kl", entry_clip=0.05
        ),
        "eager forward KL, leanest": lambda: eager_forward_kl(teacher, student),
        **peers(teacher, student),
    }
    if compiled:
        fused_kl, fused_jsd = (torch.compile(f, dynamic=False) for f in (eager_forward_kl, gkd_jsd))
        entries["torch.compile of the leanest forward KL"] = lambda: fused_kl(teacher, student)
        entries["torch.compile of GKD's JSD"] = lambda: fused_jsd(teacher, student)
    with torch.no_grad():
        return interleaved(running(entries), rounds, device)


def compare_gradients(n: int, v: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each of our gradients, written over the student's logits."""
    teacher, student = logits_of_two(n, v, dtype, device)
    buffer, shard, ones = student.clone(), Shard.of(v, None, None), torch.ones(n, device=device)
    part_N8 = pair_ops.statistics(teacher, student, shard, 1.0, other_entropy=False)
    scale_N5, _, _ = pair_ops.combine(part_N8[None], 1.0, student_first=False)

    def ours(form: pair_ops.Form):
        sums_N3 = pair_ops.entry_sums(teacher, student, scale_N5, form, shard, 1.0)
        return lambda: pair_ops.gradient(
            teacher, buffer, scale_N5, sums_N3, ones, form, shard, 1.0, inplace=True
        )  # fmt: skip

    read, write = floors(teacher, device)[0], floors(buffer, device)[1]
    entries = {
        WRITE: lambda: (read(), write()),
        OURS: ours(pair_ops.Form("forward_kl")),
        "ours, reverse_kl": ours(pair_ops.Form("reverse_kl")),
        "ours, jsd": ours(pair_ops.Form("jsd")),
        "ours, forward_kl with clipped entries": ours(pair_ops.Form("forward_kl", limit=0.05)),
    }
    return interleaved(entries, rounds, device, prepare=lambda name: buffer.copy_(student))


def compare_linear(
    n: int, d: int, v: int, device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """Compare JSD from bf16 hidden states [N, D] to the gradients of the student's and of its LM head [V, D].

    Returns each entry's seconds, its transient memory beyond the gradients in bytes, and the relative error of its
    gradient of the hidden states, in norm, against fp64.
    """
    g = torch.Generator(device=device).manual_seed(0)
    teacher, student = (torch.randn(n, d, generator=g, device=device).bfloat16() for _ in range(2))
    heads = (torch.randn(v, d, generator=g, device=device) * 2 * d**-0.5 for _ in range(2))
    teacher_head, student_head = (x.bfloat16() for x in heads)
    student.requires_grad_()
    student_head.requires_grad_()

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (student, student_head))

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        return teacher @ teacher_head.T, student @ student_head.T

    def linear(keep_bytes: int | None):
        both = teacher, teacher_head, student, student_head
        return lambda: gradients(linear_divergence(*both, kind="jsd", keep_bytes=keep_bytes).value.sum())

    def liger():
        loss = liger_jsd().LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
        labels = torch.zeros(n, dtype=torch.long, device=device)
        return gradients(loss(student, student_head, teacher, teacher_head, labels) * n)  # it returns the mean

    entries = running(
        {
            "ours, linear_divergence": linear(None),
            "ours, linear_divergence, keep_bytes=0": linear(0),
            "ours, linear_divergence, all logits kept": linear(8 * n * v),
            "ours, of whole logits": lambda: gradients(
                divergence(*logits(), kind="jsd", inplace_backward=True).value.sum()
            ),
            "GKD's JSD of whole logits, eager": lambda: gradients(gkd_jsd(*logits()).sum()),
            "Liger's fused linear JSD": liger,
        }
    )
    times = interleaved(entries, rounds, device)
    held = (student.numel() + student_head.numel()) * student.element_size()
    memory = {name: max(0, peak_extra_bytes(f, device) - held) for name, f in entries.items()}
    exact_hidden = student.detach().double().requires_grad_()
    exact_logits = exact_hidden @ student_head.detach().double().T
    loss = gkd_jsd(teacher.double() @ teacher_head.double().T, exact_logits).sum()
    (exact,) = torch.autograd.grad(loss, exact_hidden)
    error = {name: ((f()[0].double() - exact).norm() / exact.norm()).item() for name, f in entries.items()}
    return times, memory, error


def rows_of(times: dict[str, list[float]], floor: str) -> str:
    """Return a table of medians, beside the floor and our forward KL."""
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [
        (name, f"{seconds * 1e3:.2f}", f"{median[floor] / seconds:.2f}", f"{seconds / median[OURS]:.1f}")
        for name, seconds in sorted(median.items(), key=lambda x: x[1])
    ]
    return table(["", "median ms", "fraction of floor", "times ours, forward_kl"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"Machine: {machine(args.device, args.threads)}.")
    for dtype in DTYPES:
        size = args.tokens, args.vocab, dtype, args.device, args.rounds
        title = f"N = {args.tokens}, V = {args.vocab:,}, {str(dtype)[6:]}"
        print(f"\n**forward, {title}**\n\n{rows_of(compare(*size, not args.no_compile), READ)}")
        print(f"\n**gradient, {title}**\n\n{rows_of(compare_gradients(*size), WRITE)}")
    n, d, v = (args.tokens, 4096 if args.device == "cuda" else 256, args.vocab)
    times, memory, error = compare_linear(n, d, v, args.device, args.rounds)
    ours = statistics.median(times["ours, linear_divergence"])
    rows = (
        (name, f"{median * 1e3:.0f}", f"{median / ours:.1f}", f"{memory[name] / 1e6:.0f}", f"{error[name]:.1e}")
        for name, median in ((name, statistics.median(seconds)) for name, seconds in times.items())
    )
    columns = ["", "median ms", "times ours", "transient memory MB", "error of the gradient"]
    print(f"\n**JSD behind the LM head, forward and backward, N = {n}, D = {d}, V = {v:,}, bf16 operands**\n")
    print(table(columns, rows))
    print(f"\nAfter the run: {load()}.")


if __name__ == "__main__":
    main()
