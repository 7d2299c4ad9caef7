"""The compiled kernels as torch operators, for tracers such as torch.compile: schema, implementation, fake result.

Outside of a trace nothing comes through here, because a call of an operator costs several times as much as a call of
the kernel's own function (docs/guides/reuse.md). None of them mutates anything.
"""

import torch

from megatron_egrsd.vocab_parallel import kernels
from megatron_egrsd.vocab_parallel.shard import Shard

_SCALE = "Tensor? temperatures, float temperature, int start, int valid"  # one per token, or one for all


def _shard(logits: torch.Tensor, start: int, valid: int) -> Shard:
    columns = logits.shape[-1]
    return Shard(start, columns, valid, start + columns, None, 1)  # the kernels look at start and valid only


@torch.library.custom_op(
    "megatron_egrsd::statistics", mutates_args=(), schema=f"(Tensor logits, Tensor? target, {_SCALE}) -> Tensor"
)
def statistics(logits, target, temperatures, temperature, start, valid):
    scale = temperature if temperatures is None else temperatures
    return kernels.statistics(logits, target, _shard(logits, start, valid), scale)


@statistics.register_fake
def _(logits, target, temperatures, temperature, start, valid):
    return logits.new_empty((logits.numel() // logits.shape[-1], 4), dtype=torch.float32)


@torch.library.custom_op(
    "megatron_egrsd::combine", mutates_args=(), schema="(Tensor parts) -> (Tensor, Tensor, Tensor, Tensor)"
)
def combine(parts):
    return kernels.combine(parts)


@combine.register_fake
def _(parts):
    tokens = parts.shape[1]
    return parts.new_empty((tokens, 4)), *(parts.new_empty(tokens) for _ in range(3))


@torch.library.custom_op(
    "megatron_egrsd::logits_grad",
    mutates_args=(),
    schema="(Tensor logits, Tensor? target, Tensor statistics, Tensor? grad_log_prob, Tensor? grad_entropy, "
    f"Tensor? grad_log_normalizer, {_SCALE}) -> Tensor",
)
def logits_grad(
    logits,
    target,
    statistics,
    grad_log_prob,
    grad_entropy,
    grad_log_normalizer,
    temperatures,
    temperature,
    start,
    valid,
):
    gradients = kernels.Gradients(grad_log_prob, grad_entropy, grad_log_normalizer)
    scale = temperature if temperatures is None else temperatures
    shard = _shard(logits, start, valid)
    return kernels.logits_grad(logits, target, statistics, gradients, shard, scale, inplace=False)


@logits_grad.register_fake
def _(logits, target, statistics, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
