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

HERE, CSRC = Path(__file__).parent, Path(__file__).parents[2] / "csrc"
_LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.+?), kThreads, 0, [^;]+?>>>\(", re.S)
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class _Logits(ctypes.Structure):
    """cuda::Logits of csrc/cuda/kernels.h."""

    _fields_ = (
        [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)]
        + [(name, ctypes.c_int64) for name in ("row_stride", "rows", "columns", "valid", "vocab_start")]
        + [("target", ctypes.c_void_p), ("inverse_temperature", ctypes.c_double)]
    )


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def source() -> str:
    return (CSRC / "cuda" / "kernels.cu").read_text()


def build(source: str, directory: Path) -> ctypes.CDLL:
    """Compile `source`, the text of kernels.cu, into a library in `directory`."""
    for part in ("cuda", "common"):
        shutil.copytree(CSRC / part, directory / part)
    for file in HERE.glob("*.[hc]*"):
        shutil.copy(file, directory / "cuda")
    rewritten, launches = _LAUNCH.subn(r"cuda_on_cpu::launch(\1, \2, kThreads)(", source)
    assert launches == source.count("<<<") > 0
    (directory / "cuda" / "kernels.cpp").write_text(rewritten)
    flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    files = ["-I", directory / "cuda", directory / "cuda" / "entry.cpp", "-o", directory / "kernels.so"]
    subprocess.run([compiler(), *flags, *files], check=True, timeout=120)
    return ctypes.CDLL(str(directory / "kernels.so"))


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        return build(source(), Path(directory))


class Kernels:
    """The kernels of `library` with the interface that vocab_parallel/ops.py expects."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def statistics(self, logits, target, shard, temperature):
        described = _describe(logits, target, shard, temperature)
        splits = self._library.split_statistics(ctypes.byref(described))
        workspace, out = (
            torch.full((max(1, len(target)) * splits, 4), torch.nan),
            torch.full((len(target), 4), torch.nan),
        )
        _check(self._library.statistics(ctypes.byref(described), splits, _pointer(workspace), _pointer(out)))
        return out

    def combine(self, parts):
        parts = parts.contiguous()
        ranks, rows, _ = parts.shape
        whole, log_prob, entropy = (torch.full((rows, *rest), torch.nan) for rest in ((4,), (), ()))
        sizes = ctypes.c_int64(ranks), ctypes.c_int64(rows)
        _check(self._library.combine(_pointer(parts), *sizes, *map(_pointer, (whole, log_prob, entropy))))
        return whole, log_prob, entropy

    def logits_grad(self, logits, target, statistics, grad_log_prob, grad_entropy, shard, temperature, *, inplace):
        grad = logits if inplace else torch.full_like(logits, torch.nan, memory_format=torch.contiguous_format)
        described = _describe(logits, target, shard, temperature)
        given = [_pointer(x) for x in (statistics, grad_log_prob, grad_entropy, grad)]
        _check(self._library.logits_grad(ctypes.byref(described), *given, ctypes.c_int64(grad.stride(0))))
        return grad


def _describe(logits, target, shard, temperature) -> _Logits:
    rows, columns = logits.shape
    return _Logits(logits.data_ptr(), _DTYPES.index(logits.dtype), logits.stride(0), rows, columns, shard.valid,
                   shard.start, target.data_ptr(), 1.0 / temperature)  # fmt: skip


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _check(error: int) -> None:
    assert error == 0, f"the kernel failed with {error}"
