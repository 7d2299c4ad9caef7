"""The vocabulary shard of a rank, and the checks that every public function makes before it reads memory.

Shape suffixes used in this package: N tokens (all leading dimensions flattened), V columns of this rank's shard,
D hidden size, R ranks of the tensor-parallel group.
"""

import itertools
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

IGNORE_INDEX = -100  # target id of an ignored position: log-prob, entropy and gradient are exact zeros
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shard:
    """Columns [start, start + columns) of the padded vocabulary, of which the first `valid` are real tokens."""

    start: int
    columns: int
    valid: int
    vocab_size: int
    group: dist.ProcessGroup | None
    ranks: int

    @classmethod
    def of(cls, columns: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> "Shard":
        """Return the shard of the calling rank. Ranks hold equal numbers of columns in rank order, as in Megatron.

        Raises ValueError if `vocab_size` is not in [1, ranks * columns].
        """
        ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        total = ranks * columns
        vocab_size = total if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= total:
            raise ValueError(
                f"vocab_size {vocab_size} is not in [1, {total}]: {ranks} rank(s) hold {columns} columns each"
            )
        start = rank * columns
        return cls(start, columns, min(max(vocab_size - start, 0), columns), vocab_size, group, ranks)

    def slice(self, first: int, last: int) -> "Shard":
        """Return the shard's columns [first, last), counted from its own first column."""
        valid = min(max(self.valid - first, 0), last - first)
        return Shard(self.start + first, last - first, valid, self.vocab_size, self.group, self.ranks)


def check_logits(name: str, logits: torch.Tensor) -> None:
    """Raise ValueError unless `logits` is a floating [..., V] tensor of contiguous rows that has a view [N, V]."""
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V > 0, got shape {tuple(logits.shape)}")
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {logits.dtype} {tuple(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name} must have contiguous rows, got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
    if not _leading_dimensions_merge(logits):
        raise ValueError(
            f"{name}'s leading dimensions cannot be flattened without a copy of the logits: shape "
            f"{tuple(logits.shape)}, strides {logits.stride()}; transpose the target instead, or call .contiguous()"
        )


def _leading_dimensions_merge(x: torch.Tensor) -> bool:
    sizes_and_strides = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    pairs = itertools.pairwise(sizes_and_strides)
    return x.numel() == 0 or all(outer == inner_size * inner for (_, outer), (inner_size, inner) in pairs)


def check_target(target: torch.Tensor, shape: torch.Size, against: str, device: torch.device, vocab_size: int) -> None:
    """Raise ValueError unless `target` is int64 of `shape` on `device`, each id in [0, vocab_size) or IGNORE_INDEX.

    The ids are checked always on the CPU, never inside torch.compile, and on an accelerator only if
    MEGATRON_EGRSD_CHECK_TARGETS=1 (it waits for the device). An unchecked id outside [0, vocab_size) gives -inf.
    """
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype} {tuple(target.shape)}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)} to match {against}, got {tuple(target.shape)}")
    if target.device != device:
        raise ValueError(f"target is on {target.device}, {against} on {device}; shape {tuple(target.shape)}")
    if torch.compiler.is_compiling() or target.numel() == 0:
        return
    if device.type == "cpu" or os.environ.get("MEGATRON_EGRSD_CHECK_TARGETS") == "1":
        ids = torch.where(target == IGNORE_INDEX, 0, target)
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"target of shape {tuple(target.shape)} has id {low if low < 0 else high}, outside "
                f"[0, {vocab_size}) and not ignore_index ({IGNORE_INDEX})"
            )


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is finite and above zero."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
