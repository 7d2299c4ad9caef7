"""The vocabulary shard of a rank, and the checks that every public function makes before it reads memory.

Shape suffixes used in this package: N tokens (all leading dimensions flattened), V columns of this rank's shard,
D hidden size, R ranks of the tensor-parallel group.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_egrsd.vocab_parallel.rows import row_layout

IGNORE_INDEX = -100  # target id of an ignored position: log-prob, entropy and gradient are exact zeros
NO_TARGET = -1  # id of no column: log-prob -inf, the entropy of the row
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shard:
    """Columns [start, start + columns) of the padded vocabulary, of which the first `valid` are real tokens."""

    start: int
    columns: int
    valid: int
    vocab_size: int
    group: Any  # a ProcessGroup, or an object with rank() and size(), or None
    ranks: int

    @classmethod
    def of(cls, columns: int, group: Any, vocab_size: int | None) -> "Shard":
        """Return the shard of the calling rank. Ranks hold equal numbers of columns in rank order, as in Megatron.

        Raises ValueError if `vocab_size` is not in [1, ranks * columns].
        """
        rank, ranks = rank_and_size(group)
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


def rank_and_size(group: Any) -> tuple[int, int]:
    """Return this process's rank in `group`, which may be any object with rank() and size(), and its size."""
    if group is None:
        return 0, 1
    if hasattr(group, "rank") and hasattr(group, "size"):
        return group.rank(), group.size()
    return dist.get_rank(group), dist.get_world_size(group)


def check_logits(name: str, logits: torch.Tensor) -> None:
    """Raise ValueError unless `logits` is a floating [..., V] tensor of contiguous rows that the kernels can walk."""
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V > 0, got shape {tuple(logits.shape)}")
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {logits.dtype} {tuple(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name} must have contiguous rows, got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
    if row_layout(logits) is None:
        raise ValueError(
            f"{name}'s leading dimensions cannot be merged into two without a copy of the logits: shape "
            f"{tuple(logits.shape)}, strides {logits.stride()}; call .contiguous()"
        )


def prepare_target(
    target: torch.Tensor,
    shape: torch.Size,
    against: str,
    device: torch.device,
    vocab_size: int,
    ignore_index: int,
    out_of_vocabulary: str,
) -> torch.Tensor:
    """Return the checked `target` as the kernels take it, [N]: IGNORE_INDEX for `ignore_index`, NO_TARGET for no id.

    Raises ValueError as `check_target` does, and for an `out_of_vocabulary` that is not "error" or "zero".
    """
    if out_of_vocabulary not in ("error", "zero"):
        raise ValueError(f'out_of_vocabulary must be "error" or "zero", got {out_of_vocabulary!r}')
    strict = out_of_vocabulary == "error"
    check_target(target, shape, against, device, vocab_size if strict else None, ignore_index)
    target_N = target.reshape(-1).contiguous()
    ignored_N = target_N == ignore_index
    if not strict:
        target_N = target_N.where((target_N >= 0) & (target_N < vocab_size), NO_TARGET)
    return target_N.masked_fill(ignored_N, IGNORE_INDEX) if not strict or ignore_index != IGNORE_INDEX else target_N


def check_target(
    target: torch.Tensor,
    shape: torch.Size,
    against: str,
    device: torch.device,
    vocab_size: int | None,
    ignore_index: int = IGNORE_INDEX,
) -> None:
    """Raise ValueError unless `target` is int64 of `shape` on `device`, each id in [0, vocab_size) or `ignore_index`.

    The ids are checked always on the CPU, never inside torch.compile, and on an accelerator only if
    MEGATRON_EGRSD_CHECK_TARGETS=1 (it waits for the device). An unchecked id outside [0, vocab_size) gives -inf.
    With `vocab_size` None any id will do.
    """
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype} {tuple(target.shape)}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)} to match {against}, got {tuple(target.shape)}")
    if target.device != device:
        raise ValueError(f"target is on {target.device}, {against} on {device}; shape {tuple(target.shape)}")
    if vocab_size is None or torch.compiler.is_compiling() or target.numel() == 0:
        return
    if device.type == "cpu" or os.environ.get("MEGATRON_EGRSD_CHECK_TARGETS") == "1":
        ids = torch.where(target == ignore_index, 0, target)
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"target of shape {tuple(target.shape)} has id {low if low < 0 else high}, outside "
                f"[0, {vocab_size}) and not ignore_index ({ignore_index})"
            )


def prepare_temperature(temperature: float | torch.Tensor, target_shape: torch.Size) -> float | torch.Tensor:
    """Return the checked temperature: a number, or [N] fp32 of a tensor that has one per token.

    Raises ValueError unless a number is finite and above zero and a tensor has the target's shape. The values of a
    tensor are not looked at on an accelerator, which would wait for it.
    """
    if not isinstance(temperature, torch.Tensor):
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be finite and > 0, got {temperature}")
        return temperature
    if temperature.shape != target_shape or temperature.requires_grad:
        raise ValueError(
            f"a temperature per token must have the target's shape {tuple(target_shape)} and no gradient, got "
            f"{tuple(temperature.shape)}, requires_grad {temperature.requires_grad}"
        )
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = temperature[~((temperature > 0) & temperature.isfinite())]
        if bad.numel():
            raise ValueError(f"every temperature must be finite and > 0, got {float(bad[0])}")
    return temperature.reshape(-1).float().contiguous()
