"""Time of exact divergences of two models: ours, the leanest eager form, torch.compile of it, and GKD's JSD restated.

    python -m benchmarks.divergence --device cpu --threads 1

Prints Markdown tables. Forward only and one tensor-parallel rank: [N, V] logits of two models to a value per token. The
entries run in turn, so that a change of the machine's load meets all of them; the numbers are medians. The floor is the
time to read both tensors once, measured in the same rounds. GKD's generalised JSD is what TRL computes; the restatement
is ours, written from its formula and the tensors that it keeps.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from benchmarks.measure import load, table
from benchmarks.vocab_parallel import floors, interleaved, machine
from megatron_egrsd.vocab_parallel import divergence

DTYPES = (torch.bfloat16, torch.float32)


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


def compare(n: int, v: int, dtype: torch.dtype, device: str, rounds: int, compiled: bool) -> dict[str, list[float]]:
    g = torch.Generator(device=device).manual_seed(0)
    teacher, student = ((torch.randn(n, v, generator=g, device=device) * 3).to(dtype) for _ in range(2))
    both = [floors(x, device)[0] for x in (teacher, student)]
    entries = {
        "floor: read both once": lambda: [read() for read in both],
        "ours, forward_kl": lambda: divergence(teacher, student, kind="forward_kl"),
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
        return interleaved(entries, rounds, device)


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
        times = compare(args.tokens, args.vocab, dtype, args.device, args.rounds, not args.no_compile)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        floor, ours = median["floor: read both once"], median["ours, forward_kl"]
        print(f"\n**N = {args.tokens}, V = {args.vocab:,}, {str(dtype)[6:]}**\n")
        rows = [
            (name, f"{seconds * 1e3:.2f}", f"{floor / seconds:.2f}", f"{seconds / ours:.1f}")
            for name, seconds in sorted(median.items(), key=lambda x: x[1])
        ]
        print(table(["", "median ms", "fraction of floor", "times ours, forward_kl"], rows))
    print(f"\nAfter the run: {load()}.")


if __name__ == "__main__":
    main()
