"""The log-probability under a truncated distribution: top-p and top-k sampling, replayed in training."""

from typing import Any

import torch

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts
from megatron_egrsd.vocab_parallel.log_prob import zero_where_unknown
from megatron_egrsd.vocab_parallel.shard import (
    IGNORE_INDEX,
    Shard,
    check_logits,
    prepare_target,
    prepare_temperature,
)


def masked_log_prob(
    logits: torch.Tensor,
    keep: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = IGNORE_INDEX,
    out_of_vocabulary: str = "error",
) -> torch.Tensor:
    """Compute the target's log-probability among the columns that `keep` [..., V / ranks] (bool) names, and its own.

    The target is always kept, so that the result [...] is finite if an engine's mask omits the sampled token.
    The gradient of dropped columns is below 1e-37. Costs one copy of the logits, over which backward writes the
    gradient: a second backward pass raises. Other arguments and errors as in `token_statistics`.
    """
    check_logits("logits", logits)
    if keep.shape != logits.shape or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool {tuple(logits.shape)}, got {keep.dtype} {tuple(keep.shape)}")
    shard = Shard.of(logits.shape[-1], group, vocab_size)
    temperature = prepare_temperature(temperature, target.shape)
    target_N = prepare_target(
        target, logits.shape[:-1], "logits' leading dimensions", logits.device, shard.vocab_size,
        ignore_index, out_of_vocabulary,
    )  # fmt: skip
    log_prob = _MaskedLogProb.apply(logits, keep, target_N, shard, temperature).view(target.shape)
    return zero_where_unknown(log_prob, target_N) if out_of_vocabulary == "zero" else log_prob


class _MaskedLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, keep, target_N, shard, temperature):
        column_N = target_N - shard.start
        held_N = (column_N >= 0) & (column_N < shard.valid)
        column = column_N.where(held_N, 0).view(logits.shape[:-1])[..., None]
        kept = logits.masked_fill(~keep, float("-inf")).contiguous()
        at_target = logits.gather(-1, column).where(held_N.view(column.shape), kept.gather(-1, column))
        kept.scatter_(-1, column, at_target)
        part_N4 = ops.statistics(kept, target_N, shard, temperature)
        statistics_N4, log_prob_N, _, _ = ops.combine(gather_parts(part_N4, shard))
        per_token = isinstance(temperature, torch.Tensor)
        ctx.save_for_backward(kept, target_N, statistics_N4, temperature if per_token else None)
        ctx.shard, ctx.temperature = shard, None if per_token else temperature
        return log_prob_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        kept, target_N, statistics_N4, temperature_N = ctx.saved_tensors
        temperature = ctx.temperature if temperature_N is None else temperature_N
        gradients = ops.Gradients(grad_N.contiguous())
        grad = ops.logits_grad(kept, target_N, statistics_N4, gradients, ctx.shard, temperature, inplace=True)
        return grad, None, None, None, None
