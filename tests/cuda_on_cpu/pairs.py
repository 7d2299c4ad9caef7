"""The CUDA kernels of two tensors of logits on the CPU, with the interface of vocab_parallel/pair_ops.py."""

import ctypes

import torch

from megatron_egrsd.vocab_parallel.rows import row_layout
from tests.cuda_on_cpu import DTYPES, LAYOUT, check, pointer

ENTRY = "pair_entry.cpp"


def _layout(name: str) -> list:
    return [(f"{name}_{field}", type_) for field, type_ in LAYOUT]


class _Pair(ctypes.Structure):
    """Pair of csrc/common/divergence.h."""

    _fields_ = (
        [("first", ctypes.c_void_p), ("second", ctypes.c_void_p), ("dtype", ctypes.c_int)]
        + _layout("first")
        + _layout("second")
        + [(name, ctypes.c_int64) for name in ("rows", "columns", "valid")]
        + [("inverse_temperature", ctypes.c_double)]
    )


class _Entries(ctypes.Structure):
    """Entries of csrc/common/divergence.h."""

    _fields_ = (("scale", ctypes.c_void_p), ("kind", ctypes.c_int), ("limit", ctypes.c_float), ("beta", ctypes.c_float))


class _PairGradient(ctypes.Structure):
    """PairGradient of csrc/common/divergence.h."""

    _fields_ = [("data", ctypes.c_void_p), *LAYOUT, ("sums", ctypes.c_void_p), ("grad_value", ctypes.c_void_p)]


class PairKernels:
    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def statistics(self, first, second, shard, temperature, other_entropy):
        return self._by_parts(
            "pair_statistics", 8, _pair(first, second, shard, temperature), ctypes.c_bool(other_entropy)
        )

    def entry_sums(self, teacher, student, scale, form, shard, temperature):
        entries = _Entries(scale.data_ptr(), *form.arguments)
        return self._by_parts("entry_sums", 3, _pair(teacher, student, shard, temperature), ctypes.byref(entries))

    def _by_parts(self, name, floats, pair, argument):
        splits = max(1, min(pair.valid // 8192, 32 // max(1, pair.rows)))  # any number must do
        workspace, out = (torch.full((max(1, pair.rows) * n, floats), torch.nan) for n in (splits, 1))
        check(getattr(self._library, name)(ctypes.byref(pair), argument, splits, pointer(workspace), pointer(out)))
        return out[: pair.rows]

    def merge(self, parts, temperature):
        out = torch.full(parts.shape[1:], torch.nan)
        check(self._library.merge_pairs(*_parts(parts, temperature), pointer(out)))
        return out

    def combine(self, parts, temperature, student_first):
        results = [torch.full((parts.shape[1], *rest), torch.nan) for rest in ((5,), (), ())]
        first = ctypes.c_bool(student_first)
        check(self._library.combine_pairs(*_parts(parts, temperature), first, *map(pointer, results)))
        return tuple(results)

    def gradient(self, teacher, student, scale, sums, grad_value, form, shard, temperature, *, inplace):
        grad = student if inplace else torch.full_like(student, torch.nan, memory_format=torch.contiguous_format)
        pair, entries = _pair(teacher, student, shard, temperature), _Entries(scale.data_ptr(), *form.arguments)
        gradient = _PairGradient(grad.data_ptr(), *row_layout(grad)[1:], sums.data_ptr(), grad_value.data_ptr())
        check(self._library.pair_gradient(*map(ctypes.byref, (pair, entries, gradient))))
        if inplace:
            torch.autograd.graph.increment_version(student)
        return grad


def _pair(first, second, shard, temperature) -> _Pair:
    rows, *layout = row_layout(first)
    return _Pair(first.data_ptr(), second.data_ptr(), DTYPES.index(first.dtype), *layout, *row_layout(second)[1:],
                 rows, first.shape[-1], shard.valid, 1.0 / temperature)  # fmt: skip


def _parts(parts, temperature) -> tuple:
    assert parts.is_contiguous()
    ranks, rows, _ = parts.shape
    return pointer(parts), ctypes.c_int64(ranks), ctypes.c_int64(rows), ctypes.c_double(1.0 / temperature)
