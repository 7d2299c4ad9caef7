"""The kernels' stages: build the extension, test it on the device, time it beside other implementations.

    python -m tools.gpu.kernels build | tests | speed | divergences

With DEVICE=cpu the extension is built without its CUDA part, the tests are those that run the CUDA kernels thread by
thread on the CPU, and the times are those of the CPU kernels on few rows.
"""

import ctypes
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from tools.gpu.results import record

ON_GPU = os.environ.get("DEVICE") != "cpu"
# The least share of the copy bandwidth, and the most time against the materialised LM head.
FORWARD, BACKWARD, LM_HEAD = 0.85, 0.80, 1.10
DIVERGENCE = {torch.bfloat16: 0.60, torch.float32: 0.85}  # forward


def build() -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "build/gpu/temp"]
    if ON_GPU:
        subprocess.run([*command, "--inplace"], check=True)
        from megatron_egrsd.vocab_parallel import ops

        if not ops.compiled(torch.device("cuda")):
            sys.exit("the build left the CUDA part out; its warning is above")
    else:  # apart: other processes may be using the installed one
        apart = Path("build/gpu/lib")
        cpu = os.environ | {"MEGATRON_EGRSD_BUILD": "cpu"}
        subprocess.run([*command, "--build-lib", str(apart)], check=True, env=cpu)
        ctypes.CDLL(str(next(apart.rglob("_kernels*.so"))))
    record("build", cuda=ON_GPU, loads=True)


def tests() -> None:
    # The training stages measure the same as tests/gpu/test_training.py asserts.
    chosen = ["tests/gpu", "--ignore", "tests/gpu/test_training.py"]
    if not ON_GPU:
        chosen += ["tests/unit/test_vocab_parallel.py", "tests/unit/test_divergence.py"]
        chosen += ["-k", "CUDA and (inplace or nan or log_ratio)"]
    # pytest's plugins and the settings for them may be missing on a GPU machine, and what tests/conftest.py imports.
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-o", "addopts=", "--tb=short", *chosen]
    status = subprocess.run(command).returncode
    record("tests", command=" ".join(chosen), passed=status == 0)
    sys.exit(status)


def speed() -> None:
    from benchmarks.vocab_parallel import compare_linear, compare_logits, machine

    device, rounds = ("cuda", 7) if ON_GPU else ("cpu", 2)
    tokens, vocabularies, width = (8192, (151936, 151936 // 8), 4096) if ON_GPU else (16, (8192, 1024), 64)
    print(machine(device, torch.get_num_threads()), flush=True)
    for v, dtype in itertools.product(vocabularies, (torch.bfloat16, torch.float32)):
        for direction, times, memory, floor in compare_logits(tokens, v, dtype, device, rounds, compiled=ON_GPU):
            title = f"{direction}, N = {tokens:,}, V = {v:,}, {str(dtype)[6:]}"
            moved = tokens * v * dtype.itemsize * (1 if direction == "forward" else 2)
            goal = ("ours", FORWARD) if direction == "forward" else ("ours, in place", BACKWARD)
            _record_times(title, times, floor, moved, *goal, memory=memory)
        if ON_GPU:
            torch.cuda.empty_cache()
    times, memory, error = compare_linear(tokens, width, vocabularies[0], device, rounds)
    median = {name: statistics.median(t) for name, t in times.items()}
    base = median["materialised, bf16 logits"]
    for name, seconds in median.items():
        slow = name in ("chunks, bf16 logits", "chunks, fp32 logits") and seconds > LM_HEAD * base
        record(
            f"LM head, forward and backward, N = {tokens:,}, D = {width:,}, V = {vocabularies[0]:,}, bf16",
            entry=name, ms=round(seconds * 1e3, 2), against_materialised=round(seconds / base, 3),
            extra_mb=round(memory[name] / 1e6, 1), log_prob_error=error.get(name),
            **{"complaint": f"slower than {LM_HEAD:.2f} of the materialised one"} if slow else {},
        )  # fmt: skip


def divergences() -> None:
    from benchmarks.divergence import OURS, READ, WRITE, compare, compare_gradients, machine

    device, rounds = ("cuda", 7) if ON_GPU else ("cpu", 2)
    tokens, v = (8192, 151936) if ON_GPU else (16, 8192)
    print(machine(device, torch.get_num_threads()), flush=True)
    for dtype, goal in DIVERGENCE.items():
        both, size = 2 * tokens * v * dtype.itemsize, f"N = {tokens:,}, V = {v:,}, {str(dtype)[6:]}"
        times = compare(tokens, v, dtype, device, rounds, compiled=ON_GPU)
        _record_times(f"divergence, forward, {size}", times, READ, both, OURS, goal)
        times = compare_gradients(tokens, v, dtype, device, rounds)
        title = f"divergence, gradient over the student's logits, {size}"
        _record_times(title, times, WRITE, both * 3 // 2, OURS, BACKWARD)
        if ON_GPU:
            torch.cuda.empty_cache()


def _record_times(
    title: str, times: dict, floor: str, moved: int, ours: str, goal: float, memory: dict | None = None
) -> None:
    """Record a row for each entry. The floor moves `moved` bytes; `ours` should reach the share `goal` of its speed."""
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, seconds in sorted(median.items(), key=lambda item: item[1]):
        share = median[floor] / seconds
        extra = {"extra_mb": round(memory[name] / 1e6, 1)} if memory else {}
        missed = {"complaint": f"below {goal} of the floor"} if name == ours and share < goal else {}
        record(
            title, entry=name, ms=round(seconds * 1e3, 3), gb_per_second=float(f"{moved / seconds / 1e9:.3g}"),
            share_of_floor=round(share, 3), times_ours=round(seconds / median[ours], 2), **extra, **missed,
        )  # fmt: skip


if __name__ == "__main__":
    {"build": build, "tests": tests, "speed": speed, "divergences": divergences}[sys.argv[1]]()
