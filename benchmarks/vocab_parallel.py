"""Time and memory of vocab-parallel log-prob + entropy: ours, eager, torch.compile, megatron-core, and what peers do.

    python -m benchmarks.vocab_parallel --device cpu --threads 2 --output docs/measurements/performance

Writes OUTPUT-<device>.md (tables) and OUTPUT-<device>.png. Every entry computes, for one tensor-parallel rank, log-prob
and entropy of each row of [N, V] logits, or the gradient of both from given upstream gradients. The entries run
interleaved, so that a change of the machine's load meets all of them; the numbers are medians. The floors (reading the
logits once; reading and writing them once) are measured in the same rounds. Collectives are left out: one rank.
Memory on the CPU is the process's high-water mark: with malloc settings that keep memory back it reads 0.

The restatements of verl, slime, AReaL and Liger below are ours, written from what their functions compute and keep,
not their code; if a peer's function gives no entropy, the entry says so and is compared as it is. On a GPU Liger's
own kernels are compared too. An entry of others that does not run here is left out, with a line that says so.
"""

import argparse
import datetime
import gc
import itertools
import os
import shlex
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.measure import commit, in_turn, load, processor, seconds_of, table
from megatron_egrsd.vocab_parallel import kernels, linear_log_prob_and_entropy, ops
from megatron_egrsd.vocab_parallel.shard import Shard

# --- forward: (logits [N, V], target [N]) -> whatever the implementation keeps and returns ---------------------------


def ours_forward(logits, target):
    shard = Shard.of(logits.shape[1], None, None)
    return ops.combine(ops.statistics(logits, target, shard, 1.0)[None])


def eager_forward(logits, target):
    """Compute with the leanest plain torch: one exponential, in place if possible, nothing kept for a backward."""
    x = logits.float()
    peak = x.amax(-1, keepdim=True)
    at_target = x.gather(1, target[:, None]) - peak
    d = x - peak
    e = d.exp()
    total = e.sum(-1)
    return at_target[:, 0] - total.log(), total.log() - e.mul_(d).sum(-1) / total


def megatron_forward(logits, target):
    """Compute megatron-core's unfused cross-entropy on one rank (log-prob only): fp32 copy, softmax kept."""
    x = logits.float() if logits.dtype != torch.float32 else logits.clone()
    x.sub_(x.amax(-1, keepdim=True))
    at_target = x.gather(1, target[:, None])[:, 0].clone()
    total = x.exp_().sum(-1)
    return at_target - total.log(), x.div_(total[:, None])


def verl_forward(logits, target):
    """Compute log-prob as Megatron's on a clone, and the entropy from its own softmax; two passes over fp32 logits."""
    log_prob, softmax = megatron_forward(logits, target)
    x = logits.float()
    peak = x.amax(-1, keepdim=True)
    e = (x - peak).exp_()
    total = e.sum(-1, keepdim=True)
    p = e.div_(total)
    mean = (p * x).sum(-1, keepdim=True)
    return log_prob, (peak + total.log() - mean)[:, 0], softmax, p, mean


def slime_forward(logits, target):
    """Compute in one fp32 buffer for both results, the softmax written over it."""
    x = logits.float() if logits.dtype != torch.float32 else logits.clone()
    peak = x.amax(-1, keepdim=True)
    x.sub_(peak)
    at_target = x.gather(1, target[:, None])[:, 0].clone()
    e = x.exp()
    total = e.sum(-1)
    entropy = total.log() - (e * x).sum(-1) / total
    return at_target - total.log(), entropy, e.div_(total[:, None])


def areal_forward(logits, target):
    """Compute softmax and the product with the logits as two buffers; only the softmax is kept."""
    x = logits.float()
    d = x - x.amax(-1, keepdim=True)
    at_target = d.gather(1, target[:, None])[:, 0]
    e = d.exp()
    total = e.sum(-1)
    p = e.div_(total[:, None])
    return at_target - total.log(), total.log() - (p * d).sum(-1), p


def liger_forward(logits, target):
    """Compute vocab-parallel cross-entropy (log-prob only): a pass for the maximum, then a summed fp32 exp buffer."""
    peak = logits.amax(-1).float()
    e = (logits.float() - peak[:, None]).exp_()
    return logits.gather(1, target[:, None])[:, 0].float() - peak - e.sum(-1).log()


# --- backward: gradient of the logits --------------------------------------------------------------------------------


def eager_backward(logits, target, lse, entropy, g, h):
    log_p = logits.float() - lse[:, None]
    gradient = log_p.exp()
    gradient *= (log_p.add_(entropy[:, None]).mul_(h[:, None]).add_(g[:, None])).neg_()
    gradient.scatter_add_(1, target[:, None], g[:, None])
    return gradient.to(logits.dtype)


def megatron_backward(softmax, target, g, dtype):
    """Compute the gradient from the kept softmax, in place; log-prob only."""
    softmax.scatter_add_(1, target[:, None], -torch.ones_like(g)[:, None])
    return softmax.mul_(-g[:, None]).to(dtype)


# --- measuring -------------------------------------------------------------------------------------------------------


def gpu_seconds(function) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(entries: dict, rounds: int, device: str, prepare=lambda name: None) -> dict[str, list[float]]:
    """Return the seconds of each entry, without those of a first round, which warms up."""
    clock = gpu_seconds if device == "cuda" else seconds_of
    return {name: seconds[1:] for name, seconds in in_turn(entries, rounds + 1, clock, prepare).items()}


def peak_extra_bytes(function, device: str) -> float:
    """Return the highest memory above that held before the call. CPU: from the process's high-water mark."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(key):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return max(0, status("VmHWM") - before)


def floors(logits, device: str):
    """Return (read the logits, read and write them in place), the least that any implementation can do."""
    if device == "cpu":
        return lambda: kernels.read_floor(logits), lambda: kernels.read_write_floor(logits)
    # A copy reads and writes each byte once; half of its time is the read at that bandwidth.
    half = logits.view(-1)[: logits.numel() // 2]
    sink = torch.empty_like(half)
    whole = torch.empty_like(logits)
    return lambda: sink.copy_(half), lambda: whole.copy_(logits)


def compare_logits(n, v, dtype, device, rounds, compiled):
    g = torch.Generator(device=device).manual_seed(0)
    logits = (torch.randn(n, v, generator=g, device=device) * 3).to(dtype)
    target = torch.randint(0, v, (n,), generator=g, device=device)
    read, _ = floors(logits, device)
    forward = {
        "floor: read": read,
        "ours": lambda: ours_forward(logits, target),
        "eager, leanest": lambda: eager_forward(logits, target),
        "megatron-core (no entropy)": lambda: megatron_forward(logits, target),
        "verl": lambda: verl_forward(logits, target),
        "slime": lambda: slime_forward(logits, target),
        "AReaL": lambda: areal_forward(logits, target),
        "Liger (no entropy)": lambda: liger_forward(logits, target),
    }
    if compiled:
        fused = torch.compile(eager_forward, dynamic=False)
        forward["torch.compile"] = lambda: fused(logits, target)
    fused_ce = megatron_fused(logits, target)
    if fused_ce:
        forward["megatron-core fused (no entropy)"] = fused_ce
    if device == "cuda":
        forward["Liger's kernel (no entropy)"] = lambda: liger().liger_cross_entropy(logits, target, reduction="none")
    forward = running(forward)
    times = interleaved(forward, rounds, device)
    memory = {name: peak_extra_bytes(f, device) for name, f in forward.items()}
    yield "forward", times, memory, "floor: read"

    whole, log_prob, entropy, _ = ours_forward(logits, target)
    lse = logits.gather(1, target[:, None])[:, 0].float() - log_prob
    g_lp, g_h = torch.randn(2, n, generator=g, device=device)
    shard = Shard.of(v, None, None)
    buffer = logits.clone()
    softmax = logits.float().softmax(-1)
    _, write = floors(buffer, device)

    def ours(grad_entropy, inplace):
        return lambda: ops.logits_grad(
            buffer, target, whole, ops.Gradients(g_lp, grad_entropy), shard, 1.0, inplace=inplace
        )

    backward = {
        "floor: read + write": write,
        "ours, in place": ours(None, True),
        "ours, in place, with entropy": ours(g_h, True),
        "ours, new tensor": ours(None, False),
        "eager, leanest, with entropy": lambda: eager_backward(logits, target, lse, entropy, g_lp, g_h),
        "megatron-core (kept softmax)": lambda: megatron_backward(softmax, target, g_lp, dtype),
    }
    if compiled:
        fused_backward = torch.compile(eager_backward, dynamic=False)
        backward["torch.compile, with entropy"] = lambda: fused_backward(logits, target, lse, entropy, g_lp, g_h)
    backward = running(backward)

    def fresh(name):  # in-place entries overwrite what they read
        if name.startswith(("ours", "floor")):
            buffer.copy_(logits)
        if name.startswith("megatron"):
            softmax.fill_(1 / v)

    times = interleaved(backward, rounds, device, fresh)
    memory = {name: peak_extra_bytes(f, device) for name, f in backward.items()}
    yield "backward", times, memory, "floor: read + write"


def running(entries: dict) -> dict:
    """Return the entries that run here: ours must, what others lack or cannot do is printed."""
    kept = {}
    for name, function in entries.items():
        try:
            function()
        except Exception as error:
            if name.startswith(("ours", "floor")):
                raise
            print(f"left out: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
        else:
            kept[name] = function
    return kept


def liger():
    """Return Liger's own functions. Raises ImportError if liger-kernel is not installed."""
    from liger_kernel.transformers import functional

    return functional


def megatron_fused(logits, target):
    """Return megatron-core's fused cross-entropy itself if it is installed and its group can be a single rank."""
    try:
        import torch.distributed as dist
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    except ImportError:
        return None
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("nccl" if logits.is_cuda else "gloo", store=store, rank=0, world_size=1)
    # its forward overwrites fp32 input, so it gets a copy, as a caller that needs its logits would make
    own = logits.float if logits.dtype != torch.float32 else logits.clone
    return lambda: fused_vocab_parallel_cross_entropy(own()[None], target[None], dist.group.WORLD)


def compare_linear(n, d, v, device, rounds):
    """Compare forms of the LM head, forward and backward: all logits in bf16, chunks with bf16 and with fp32 logits."""
    g = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(v, d, generator=g, device=device) * 2 * d**-0.5).bfloat16().requires_grad_()
    target = torch.randint(0, v, (n,), generator=g, device=device)
    g_lp = torch.randn(n, generator=g, device=device)
    from megatron_egrsd.vocab_parallel import log_prob_and_entropy

    def materialised():
        log_prob, _ = log_prob_and_entropy(hidden @ weight.T, target, inplace_backward=True)
        return log_prob, torch.autograd.grad((log_prob * g_lp).sum(), (hidden, weight))

    def chunks(dtype, keep_bytes=None):
        def run():
            log_prob, _ = linear_log_prob_and_entropy(hidden, weight, target, logits_dtype=dtype, keep_bytes=keep_bytes)
            return log_prob, torch.autograd.grad((log_prob * g_lp).sum(), (hidden, weight))

        return run

    entries = {
        "materialised, bf16 logits": materialised,
        "chunks, bf16 logits": chunks(torch.bfloat16),
        "chunks, bf16 logits, none kept": chunks(torch.bfloat16, 0),
        "chunks, fp32 logits": chunks(torch.float32),
    }
    peers = {}
    if device == "cuda":  # no entropy, and one weight for all tokens

        def fused_linear():
            loss = liger().liger_fused_linear_cross_entropy(hidden, weight, target, reduction="sum")
            return torch.autograd.grad(loss, (hidden, weight))

        peers = running({"Liger's fused linear cross-entropy (no entropy, one weight)": fused_linear})
    times = interleaved(entries | peers, rounds, device)
    gradients = (hidden.numel() + weight.numel()) * 2
    memory = {name: max(0, peak_extra_bytes(f, device) - gradients) for name, f in (entries | peers).items()}
    with torch.no_grad():
        exact = (hidden.float() @ weight.float().T).double().log_softmax(-1).gather(1, target[:, None])[:, 0]
    error = {name: (f()[0].double() - exact).abs().max().item() for name, f in entries.items()}
    return times, memory, error


# --- writing ---------------------------------------------------------------------------------------------------------


def comparison(times: dict, memory: dict, floor: str) -> str:
    median = {name: statistics.median(t) for name, t in times.items()}
    ours = median["ours" if "ours" in median else "ours, in place"]
    rows = (
        [name, f"{t * 1e3:.2f}", f"{median[floor] / t:.2f}", f"{t / ours:.1f}", f"{memory[name] / 1e6:.1f}"]
        for name, t in sorted(median.items(), key=lambda x: x[1])
    )
    return table(["", "median ms", "fraction of floor", "times ours", "extra memory MB"], rows)


def plot(results: list[tuple[str, dict]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:  # a bare GPU machine: the table is what counts
        print(f"{path} not drawn: matplotlib is not installed")
        return
    figure = Figure(figsize=(12, 7))
    axes = figure.subplots(2, -(-len(results) // 2), squeeze=False)
    colors = {"floor": "#999999", "ours": "#c44e52"}
    for axis, (title, times) in zip(axes.flat, results, strict=False):
        rows = sorted(((statistics.median(t) * 1e3, name) for name, t in times.items()), reverse=True)
        names, milliseconds = [name for _, name in rows], [ms for ms, _ in rows]
        colour = [colors.get(name.split(",")[0].split(":")[0], "#4c72b0") for name in names]
        bars = axis.barh(names, milliseconds, color=colour)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.set_xlabel("ms (median)")
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine(device: str, threads: int) -> str:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()}, {threads} thread(s), kernels: {kernels.instruction_set()}"
    allocator = {k: v for k, v in os.environ.items() if "MALLOC" in k or "GLIBC_TUNABLES" in k} or "default"
    return f"{name}; torch {torch.__version__}; malloc settings: {allocator}; {load()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="default: 8192 on CUDA, 256 on the CPU")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936, 151936 // 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", default="docs/measurements/performance")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = args.tokens or (8192 if args.device == "cuda" else 256)
    source = f"Measured on {datetime.date.today():%-d %B %Y}, commit {commit() or 'unknown'}."
    command = shlex.join(["python", "-m", "benchmarks.vocab_parallel", *sys.argv[1:]])
    blocks = [f"# The vocab-parallel kernels, every table: {args.device}", f"{source} Command: `{command}`.",
              f"Machine: {machine(args.device, args.threads)}."]  # fmt: skip
    pictures = []
    for v, dtype in itertools.product(args.vocab, (torch.bfloat16, torch.float32)):
        measured = compare_logits(tokens, v, dtype, args.device, args.rounds, not args.no_compile)
        for direction, times, memory, floor in measured:
            title = f"{direction}, N = {tokens}, V = {v:,}, {str(dtype)[6:]}"
            blocks.append(f"**{title}**\n\n{comparison(times, memory, floor)}")
            print(blocks[-1], flush=True)
            if v == args.vocab[0]:
                pictures.append((title, times))
    n, d, v = (tokens, 4096, 151936) if args.device == "cuda" else (256, 256, 151936)
    times, memory, error = compare_linear(n, d, v, args.device, args.rounds)
    median = {name: statistics.median(t) for name, t in times.items()}
    base = median["materialised, bf16 logits"]
    rows = ([name, f"{t * 1e3:.1f}", f"{t / base - 1:+.0%}", f"{memory[name] / 1e6:.1f}",
             f"{error[name]:.1e}" if name in error else "-"] for name, t in median.items())  # fmt: skip
    columns = ["", "median ms", "against materialised", "transient memory MB", "log-prob error"]
    blocks.append(
        f"**LM head, forward + backward, N = {n}, D = {d}, V = {v:,}, bf16 operands**\n\n{table(columns, rows)}"
    )
    blocks.append(f"After the run: {load()}.")
    Path(f"{args.output}-{args.device}.md").write_text("\n\n".join(blocks) + "\n")
    plot(pictures, Path(f"{args.output}-{args.device}.png"))
    print("\n\n".join(blocks[-2:]))


if __name__ == "__main__":
    main()
