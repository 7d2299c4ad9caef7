"""The CUDA kernels of csrc/cuda, compiled for the CPU and run thread by thread: their logic without a GPU.

It shows the kernels' results with their indices, tails, targets, barriers and merging. It does not show their speed,
the GPU's rounding of ex2.approx, or the bindings' use of streams.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from megatron_egrsd.vocab_parallel.rows import row_layout

HERE, CSRC = Path(__file__).parent, Path(__file__).parents[2] / "csrc"
_LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.+?), kThreads, 0, [^;]+?>>>\(", re.S)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUT = [(name, ctypes.c_int64) for name in ("inner_rows", "outer_stride", "inner_stride")]


class _Logits(ctypes.Structure):
    """Logits of csrc/common/logits.h."""

    _fields_ = (
        [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)]
        + LAYOUT
        + [(name, ctypes.c_int64) for name in ("rows", "columns", "valid", "vocab_start")]
        + [("target", ctypes.c_void_p), ("temperature", ctypes.c_void_p), ("inverse_temperature", ctypes.c_double)]
    )


class _Gradient(ctypes.Structure):
    """Gradient of csrc/common/logits.h."""

    _fields_ = (
        [("data", ctypes.c_void_p)]
        + LAYOUT
        + [(name, ctypes.c_void_p) for name in ("whole", "grad_log_prob", "grad_entropy", "grad_log_normalizer")]
    )


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def source(file: str) -> str:
    return (CSRC / "cuda" / file).read_text()


def build(directory: Path, entry: str = "entry.cpp", changed: dict[str, str] | None = None) -> ctypes.CDLL:
    """Compile what `entry` includes of csrc/cuda into a library in `directory`; `changed`: other texts of files."""
    for part in ("cuda", "common"):
        shutil.copytree(CSRC / part, directory / part)
    for file in HERE.glob("*.[hc]*"):
        shutil.copy(file, directory / "cuda")
    for file, text in (changed or {}).items():
        (directory / "cuda" / file).write_text(text)
    for file in (directory / "cuda").glob("*.cu"):
        text = file.read_text()
        rewritten, launches = _LAUNCH.subn(r"cuda_on_cpu::launch(\1, \2, kThreads)(", text)
        assert launches == text.count("<<<") > 0
        file.with_suffix(".cpp").write_text(rewritten)
    flags = ["-std=c++17", "-O0", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    files = ["-I", directory / "cuda", directory / "cuda" / entry, "-o", directory / "kernels.so"]
    subprocess.run([compiler(), *flags, *files], check=True, timeout=280)
    return ctypes.CDLL(str(directory / "kernels.so"))


@functools.cache
def library(entry: str = "entry.cpp") -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        return build(Path(directory), entry)


class Kernels:
    """The kernels of `library` with the interface that vocab_parallel/ops.py expects."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def statistics(self, logits, target, shard, temperature):
        described = _describe(logits, target, shard, temperature)
        splits = self._library.split_statistics(ctypes.byref(described))
        workspace, out = (torch.full((max(1, described.rows) * n, 4), torch.nan) for n in (splits, 1))
        check(self._library.statistics(ctypes.byref(described), splits, pointer(workspace), pointer(out)))
        return out[: described.rows]

    def combine(self, parts):
        parts = parts.contiguous()
        ranks, rows, _ = parts.shape
        results = [torch.full((rows, *rest), torch.nan) for rest in ((4,), (), (), ())]
        sizes = ctypes.c_int64(ranks), ctypes.c_int64(rows)
        check(self._library.combine(pointer(parts), *sizes, *map(pointer, results)))
        return tuple(results)

    def logits_grad(self, logits, target, statistics, gradients, shard, temperature, *, inplace):
        grad = logits if inplace else torch.full_like(logits, torch.nan, memory_format=torch.contiguous_format)
        described = _describe(logits, target, shard, temperature)
        log_prob = torch.zeros(described.rows) if gradients.log_prob is None else gradients.log_prob
        given = [pointer(x) for x in (statistics, log_prob, gradients.entropy, gradients.log_normalizer)]
        gradient = _Gradient(grad.data_ptr(), *row_layout(grad)[1:], *given)
        check(self._library.logits_grad(ctypes.byref(described), ctypes.byref(gradient)))
        if inplace:
            torch.autograd.graph.increment_version(logits)
        return grad


def _describe(logits, target, shard, temperature) -> _Logits:
    rows, *strides = row_layout(logits)
    per_token = isinstance(temperature, torch.Tensor)
    return _Logits(logits.data_ptr(), DTYPES.index(logits.dtype), *strides, rows, logits.shape[-1], shard.valid,
                   shard.start, pointer(target), pointer(temperature if per_token else None),
                   1.0 if per_token else 1.0 / temperature)  # fmt: skip


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def check(error: int) -> None:
    assert error == 0, f"the kernel failed with {error}"
