"""The row kernels: compiled (`csrc/`, built by setup.py) if there is a build for the device, else plain torch.

`statistics` reads the logits once, `combine` merges parts of the vocabulary and returns the results, `logits_grad`
writes the gradient. They exchange four numbers per token, which `reference.py` describes.
"""

import functools
import warnings
from pathlib import Path

import torch

from megatron_egrsd.vocab_parallel import reference
from megatron_egrsd.vocab_parallel.shard import Shard

LIBRARIES = sorted(Path(__file__).parent.glob("_C.*so"))
if LIBRARIES:
    torch.ops.load_library(str(LIBRARIES[0]))
_OPS = torch.ops.megatron_egrsd
HAS_CUDA_KERNELS = hasattr(_OPS, "cuda_kernels")


def compiled(device: torch.device) -> bool:
    """Return whether there are compiled kernels for this device; warns once if there are none."""
    if LIBRARIES and (device.type == "cpu" or (device.type == "cuda" and HAS_CUDA_KERNELS)):
        return True
    if not torch.compiler.is_compiling():
        _warn_slow_path(device.type)
    return False


@functools.cache
def _warn_slow_path(device_type: str) -> None:
    warnings.warn(
        f"megatron_egrsd.vocab_parallel: no compiled kernels for {device_type}; using plain torch, which is several "
        "times slower. Build them with `pip install --no-build-isolation -e .` (docs/measurements/performance.md).",
        RuntimeWarning,
        stacklevel=4,
    )


def statistics(logits_NV: torch.Tensor, target_N: torch.Tensor, shard: Shard, temperature: float) -> torch.Tensor:
    """Return the statistics [N, 4] fp32 of this shard's columns."""
    function = _OPS.statistics if compiled(logits_NV.device) else reference.statistics
    return function(logits_NV, target_N, shard.start, shard.valid, 1.0 / temperature)


def combine(parts_RN4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge statistics [R, N, 4] of R disjoint parts: union [N, 4], log p(target) [N], entropy [N]; fp32, nats."""
    function = _OPS.combine if compiled(parts_RN4.device) else reference.combine
    return function(parts_RN4)


def logits_grad(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    statistics_N4: torch.Tensor,
    grad_log_prob_N: torch.Tensor,
    grad_entropy_N: torch.Tensor | None,
    shard: Shard,
    temperature: float,
    *,
    inplace: bool,
) -> torch.Tensor:
    """Return the gradient with respect to the logits, [N, V] in their dtype; `inplace` writes it over them."""
    rest = (target_N, statistics_N4, grad_log_prob_N, grad_entropy_N, shard.start, shard.valid, 1.0 / temperature)
    if compiled(logits_NV.device):
        if not inplace:
            return _OPS.logits_grad(logits_NV, *rest)
        _OPS.logits_grad_(logits_NV, *rest)
        return logits_NV
    grad_NV = logits_NV if inplace else torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    reference.logits_grad(logits_NV, grad_NV, *rest)
    return grad_NV


if LIBRARIES:

    @torch.library.register_fake("megatron_egrsd::statistics")
    def _(logits, target, vocab_start, valid, inverse_temperature):
        return logits.new_empty((logits.shape[0], 4), dtype=torch.float32)

    @torch.library.register_fake("megatron_egrsd::combine")
    def _(parts):
        tokens = parts.shape[1]
        return parts.new_empty((tokens, 4)), parts.new_empty(tokens), parts.new_empty(tokens)

    @torch.library.register_fake("megatron_egrsd::logits_grad")
    def _(logits, target, statistics, grad_log_prob, grad_entropy, vocab_start, valid, inverse_temperature):
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    @torch.library.register_fake("megatron_egrsd::logits_grad_")
    def _(logits, target, statistics, grad_log_prob, grad_entropy, vocab_start, valid, inverse_temperature):
        return None
