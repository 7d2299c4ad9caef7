"""The columns of an LM head, one chunk at a time: how many of them, and the memory for their logits."""

import copy
from collections.abc import Iterator

import torch

_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}  # logits held at a time: fits the L3 cache; occupies a GPU
_KEEP_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # a small part of the machine; TP 8 and 8192 bf16 tokens of Qwen3 fit


def chunk_plan(
    device_type: str,
    rows: int,
    columns: int,
    itemsize: int,
    chunk_size: int | None = None,
    keep_bytes: int | None = None,
) -> tuple[int, int]:
    """Return (columns of a chunk, number of chunks that are kept for backward) for logits [rows, columns].

    `itemsize` is in bytes an element; None stands for the defaults of `device_type`.
    """
    if chunk_size is None:
        chunk_size = max(1024, _CHUNK_ELEMENTS.get(device_type, 1 << 27) // max(1, rows) // 64 * 64)
    if keep_bytes is None:
        keep_bytes = _KEEP_BYTES.get(device_type, 0)
    chunk_size = min(chunk_size, columns)
    return chunk_size, keep_bytes // max(1, rows * chunk_size * itemsize)


class Chunks:
    """Memory for logits [rows, columns], `size` columns at a time: the first `kept` chunks have their own.

    All other chunks share one buffer, which exists during a reading. An iteration is one reading of all columns.
    """

    def __init__(self, rows: int, columns: int, size: int, kept: int, dtype: torch.dtype, device: torch.device):
        self.rows, self.dtype, self.device = rows, dtype, device
        self.slices = [slice(first, min(first + size, columns)) for first in range(0, columns, size)]
        self.kept = [self._empty(columns) for columns in self.slices[:kept]]
        self.read = False

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, bool]]:
        """Yield (columns, logits [rows, C], whether they are those of an earlier reading; else they must be computed).

        The last reading may overwrite them.
        """
        shared = self.slices[len(self.kept) :]
        buffer = self._empty(shared[0]).view(-1) if shared else None  # the last chunk alone may be narrower
        for i, columns in enumerate(self.slices):
            if buffer is None or i < len(self.kept):
                yield columns, self.kept[i], self.read
            else:
                width = columns.stop - columns.start
                yield columns, buffer[: self.rows * width].view(self.rows, width), False
        self.read = True

    def take(self) -> "Chunks":
        """Return these chunks for a last reading. For those after it, none is kept here."""
        taken = copy.copy(self)
        self.kept, self.read = [], False
        return taken

    def _empty(self, columns: slice) -> torch.Tensor:
        return torch.empty((self.rows, columns.stop - columns.start), dtype=self.dtype, device=self.device)


def project(hidden_ND: torch.Tensor, weight_CD: torch.Tensor, out_NC: torch.Tensor) -> None:
    """Write hidden @ weight.T into `out_NC`, of their dtype or fp32."""
    if hidden_ND.is_cuda and out_NC.dtype != hidden_ND.dtype:  # the GEMM stores its fp32 accumulators as they are
        torch.mm(hidden_ND, weight_CD.t(), out_dtype=out_NC.dtype, out=out_NC)
    else:
        torch.mm(hidden_ND.to(out_NC.dtype), weight_CD.to(out_NC.dtype).t(), out=out_NC)
