"""Log-probabilities of many ids a token, from one read of the logits: top-k distillation, candidates, log-softmax."""

import math
from typing import Any

import torch

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.collectives import SumGradient, gather_parts, sum_over_ranks
from megatron_egrsd.vocab_parallel.log_prob import token_statistics
from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX, Shard, check_logits, check_target, prepare_temperature


def gather_log_probs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    out_of_vocabulary: str = "error",
) -> torch.Tensor:
    """Compute log softmax(logits / temperature) at `ids` [..., K]: [..., K] fp32 in nats, with gradient.

    One read of the logits for any K; the ids may repeat. Two collectives: the all-gather of four floats a token, and
    an all-reduce of the K values; none in backward. With bf16 or fp16 logits the gradient at an id is the sum of two
    terms that are each rounded. Arguments and errors as in `token_statistics`, which see.
    """
    check_logits("logits", logits)
    shard = Shard.of(logits.shape[-1], group, vocab_size)
    if ids.dim() != logits.dim():
        raise ValueError(f"ids must be [..., K] for logits {tuple(logits.shape)}, got {tuple(ids.shape)}")
    if out_of_vocabulary not in ("error", "zero"):
        raise ValueError(f'out_of_vocabulary must be "error" or "zero", got {out_of_vocabulary!r}')
    strict = out_of_vocabulary == "error"
    shape = torch.Size((*logits.shape[:-1], ids.shape[-1]))
    check_target(ids, shape, "logits", logits.device, shard.vocab_size if strict else None)
    temperature = prepare_temperature(temperature, logits.shape[:-1])
    log_prob = _GatherLogProbs.apply(logits, ids, shard, temperature)
    unknown = (ids < 0) | (ids >= shard.vocab_size)
    return log_prob.masked_fill(unknown, -math.inf).masked_fill(ids == IGNORE_INDEX if strict else unknown, 0.0)


def log_softmax(
    logits: torch.Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Compute this rank's columns [..., V / ranks] of log softmax(logits / temperature), fp32, with gradient.

    Backward makes one all-reduce of a float a token, because each rank has a gradient for its own columns only.
    Arguments and errors as in `token_statistics`; padded columns get the value of their logit.
    """
    shard = Shard.of(logits.shape[-1], group, vocab_size)
    log_normalizer = token_statistics(
        logits, group=group, vocab_size=vocab_size, temperature=temperature
    ).log_normalizer
    if shard.ranks > 1:
        log_normalizer = SumGradient.apply(log_normalizer, shard)
    scale = temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature
    return logits.float() / scale - log_normalizer[..., None]


class _GatherLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, shard, temperature):
        part_N4 = ops.statistics(logits, None, shard, temperature)
        statistics_N4, _, _, log_normalizer_N = ops.combine(gather_parts(part_N4, shard))
        per_token = isinstance(temperature, torch.Tensor)
        ctx.save_for_backward(logits, ids, statistics_N4, temperature if per_token else None)
        ctx.shard, ctx.temperature = shard, None if per_token else temperature
        column, held = _columns(ids, shard)
        at_ids = logits.gather(-1, column).float().masked_fill(~held, 0.0)
        sum_over_ranks(at_ids, shard)
        return at_ids / _per_token(temperature, logits) - log_normalizer_N.view(logits.shape[:-1])[..., None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, ids, statistics_N4, temperature_N = ctx.saved_tensors
        temperature = ctx.temperature if temperature_N is None else temperature_N
        gradients = ops.Gradients(None, None, -grad.sum(-1).reshape(-1))
        grad_logits = ops.logits_grad(
            logits, None, statistics_N4, gradients, ctx.shard, temperature, inplace=False
        )  # fmt: skip
        column, held = _columns(ids, ctx.shard)
        at_ids = (grad / _per_token(temperature, logits)).masked_fill(~held, 0.0)
        return grad_logits.scatter_add_(-1, column, at_ids.to(grad_logits.dtype)), None, None, None


def _columns(ids: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (column of each id in this shard, or 0; whether this shard holds it)."""
    column = ids - shard.start
    held = (column >= 0) & (column < shard.valid)
    return column.where(held, 0), held


def _per_token(temperature: float | torch.Tensor, logits: torch.Tensor) -> float | torch.Tensor:
    return temperature.view(logits.shape[:-1])[..., None] if isinstance(temperature, torch.Tensor) else temperature
