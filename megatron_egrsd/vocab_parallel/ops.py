"""The two row kernels: statistics of the logits, and the gradient written from them. Compiled where it can be."""

import torch

from megatron_egrsd.vocab_parallel import reference
from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX, Shard


def statistics(logits_NV: torch.Tensor, target_N: torch.Tensor, shard: Shard, temperature: float) -> torch.Tensor:
    """[N, 4] fp32 statistics of this shard's columns; the meaning of the four is in `reference.py`."""
    return reference.statistics(logits_NV, target_N, shard.start, shard.valid, 1.0 / temperature)


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
    """Gradient with respect to the logits, [N, V] in their dtype; `inplace` writes it over them."""
    grad_NV = logits_NV if inplace else torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    reference.logits_grad(
        logits_NV, grad_NV, target_N, statistics_N4, grad_log_prob_N, grad_entropy_N,
        shard.start, shard.valid, 1.0 / temperature, IGNORE_INDEX,
    )  # fmt: skip
    return grad_NV
