"""The row kernels: compiled (`kernels.py`) if there is a build for the device, else plain torch (`reference.py`).

`statistics` reads the logits once, `combine` merges parts of the vocabulary and returns the results, `logits_grad`
writes the gradient. They exchange four numbers per token, which `reference.py` describes. torch.compile, which cannot
look into compiled kernels, sees them as the operators of `traced.py`.
"""

import functools
import warnings
from typing import TypeAlias

import torch

from megatron_egrsd.vocab_parallel import kernels, reference
from megatron_egrsd.vocab_parallel.kernels import Gradients
from megatron_egrsd.vocab_parallel.rows import row_views, spans
from megatron_egrsd.vocab_parallel.shard import Shard

Temperature: TypeAlias = float | torch.Tensor  # a number, or [N] fp32


def compiled(device: torch.device) -> bool:
    """Return whether there are compiled kernels for this device; warns once, with the reason, if there are none."""
    if kernels.available(device):
        return True
    if not torch.compiler.is_compiling():
        _warn_slow_path(device.type)
    return False


@functools.cache
def _warn_slow_path(device_type: str) -> None:
    warnings.warn(
        f"megatron_egrsd.vocab_parallel: no compiled kernels for {device_type} ({kernels.why_not(device_type)}); using "
        "plain torch, which is several times slower. docs/guides/reuse.md says how they are built.",
        RuntimeWarning,
        stacklevel=4,
    )


def statistics(
    logits: torch.Tensor, target_N: torch.Tensor | None, shard: Shard, temperature: Temperature
) -> torch.Tensor:
    """Return the statistics [N, 4] fp32 of this shard's columns of logits [..., V]."""
    if compiled(logits.device):
        if _is_traced(logits):
            return torch.ops.megatron_egrsd.statistics(logits, target_N, *_scale(temperature), shard.start, shard.valid)
        return kernels.statistics(logits, target_N, shard, temperature)
    parts, views = [], row_views(logits)
    for view, rows in zip(views, spans(views), strict=True):
        target = None if target_N is None else target_N[rows]
        parts.append(reference.statistics(view, target, shard.start, shard.valid, _inverse(temperature, rows)))
    return torch.cat(parts)


def combine(parts_RN4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge statistics [R, N, 4] of R disjoint parts.

    Returns their union [N, 4], log p(target) [N], entropy [N] and log-normaliser [N]; fp32, nats.
    """
    if not compiled(parts_RN4.device):
        return reference.combine(parts_RN4)
    return torch.ops.megatron_egrsd.combine(parts_RN4) if _is_traced(parts_RN4) else kernels.combine(parts_RN4)


def logits_grad(
    logits: torch.Tensor,
    target_N: torch.Tensor | None,
    statistics_N4: torch.Tensor,
    gradients: Gradients,
    shard: Shard,
    temperature: Temperature,
    *,
    inplace: bool,
) -> torch.Tensor:
    """Return the gradient with respect to the logits, in their shape and dtype; `inplace` writes it over them."""
    if compiled(logits.device):
        if not _is_traced(logits):
            return kernels.logits_grad(logits, target_N, statistics_N4, gradients, shard, temperature, inplace=inplace)
        # The compiler plans the memory, and a backward graph may not overwrite what forward has saved.
        return torch.ops.megatron_egrsd.logits_grad(
            logits, target_N, statistics_N4, *gradients, *_scale(temperature), shard.start, shard.valid
        )
    views = row_views(logits)
    out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    out_views = views if inplace else out.view(-1, out.shape[-1]).split([view.shape[0] for view in views])
    for view, out_view, rows in zip(views, out_views, spans(views), strict=True):
        given = (None if x is None else x[rows] for x in (target_N, statistics_N4, *gradients))
        target, part_N4, log_prob, entropy, log_normalizer = given
        reference.logits_grad(
            view, out_view, target, part_N4, log_prob, entropy, log_normalizer,
            shard.start, shard.valid, _inverse(temperature, rows),
        )  # fmt: skip
    return out


def _inverse(temperature: Temperature, rows: slice) -> float | torch.Tensor:
    return 1.0 / (temperature[rows].double() if isinstance(temperature, torch.Tensor) else temperature)


def _scale(temperature: Temperature) -> tuple[torch.Tensor | None, float]:
    """Return (temperatures or None, temperature): a schema has no type for either."""
    return (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, temperature)


def _is_traced(x: torch.Tensor) -> bool:
    """Return whether a tracer stands in for the tensor: it has no memory that a kernel could read."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


if kernels.WHY_NOT == "":
    from megatron_egrsd.vocab_parallel import traced  # noqa: F401 - registers the operators
