"""Time of exact divergences of two models: ours, the leanest eager form, torch.compile of it, and GKD's JSD restated.

    python -m benchmarks.divergence --device cpu --threads 1

Prints Markdown tables, of one tensor-parallel rank: [N, V] logits of two models to a value per token, and our gradient
written over the student's logits. The entries run in turn, so that a change of the machine's load meets all of them;
the numbers are medians. The floor, measured in the same rounds, is the time to read both tensors once; the gradient's
also writes one. GKD's generalised JSD is what TRL computes; the restatement is ours, written from its formula and the
tensors that it keeps.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from benchmarks.measure import load, table
from benchmarks.vocab_parallel import floors, interleaved, machine, running
from megatron_egrsd.vocab_parallel import divergence, pair_ops
from megatron_egrsd.vocab_parallel.shard import Shard

DTYPES = (torch.bfloat16, torch.float32)
READ, WRITE, OURS = "floor: read both once", "floor: read both, write one", "ours, forward_kl"


def eager_forward_kl(teacher, student):
    """KL(p || q) from one exponential of each, in place where possible; it loses the digits of a small divergence."""
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
        "JSD as in GKD and TRL, eager": lambda: gkd_jsd(teacher, student),
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
    print(f"\nAfter the run: {load()}.")


if __name__ == "__main__":
    main()
