"""Cross-entropy with label smoothing, from the log-probability and the log-normaliser."""

from typing import Any

import torch

from megatron_egrsd.vocab_parallel.collectives import sum_over_ranks
from megatron_egrsd.vocab_parallel.log_prob import token_statistics
from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX, Shard


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    group: Any = None,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    out_of_vocabulary: str = "error",
    **options: Any,
) -> torch.Tensor:
    """Return -log softmax(logits)[target] per token, [...] fp32 in nats.

    With `label_smoothing` a the target distribution has 1 - a at the target and a / (K - 1) at each of the other K - 1
    tokens of the vocabulary, as in Megatron; this reads the logits a second time and needs a second collective.
    The other arguments are those of `token_statistics`. Raises ValueError unless 0 <= label_smoothing < 1.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    values = token_statistics(
        logits, target, group=group, vocab_size=vocab_size, ignore_index=ignore_index,
        out_of_vocabulary=out_of_vocabulary, **options,
    )  # fmt: skip
    if label_smoothing == 0.0:
        return -values.log_prob
    if options.get("inplace_backward"):
        raise ValueError("label_smoothing has a second use for the logits, so inplace_backward must be off")
    shard = Shard.of(logits.shape[-1], group, vocab_size)
    temperature = options.get("temperature", 1.0)
    mean_log_prob = _MeanOverVocabulary.apply(logits, shard) / temperature - values.log_normalizer
    # 1 - a at the target and a / (K - 1) elsewhere, written with the mean over all K tokens
    smoothing = label_smoothing * shard.vocab_size / max(shard.vocab_size - 1, 1)
    has_target = (target >= 0) & (target < shard.vocab_size) & (target != ignore_index)
    return -((1.0 - smoothing) * values.log_prob + smoothing * mean_log_prob).where(has_target, 0.0)


class _MeanOverVocabulary(torch.autograd.Function):
    """The mean of all ranks' valid logits, [...] fp32. Its gradient is one value a row: an expanded tensor."""

    @staticmethod
    def forward(ctx, logits, shard):
        ctx.shard, ctx.shape, ctx.dtype = shard, logits.shape, logits.dtype
        own = logits[..., : shard.valid].sum(-1, dtype=torch.float32)
        return sum_over_ranks(own, shard) / shard.vocab_size

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        valid, columns = ctx.shard.valid, ctx.shape[-1]
        each = (grad / ctx.shard.vocab_size).to(ctx.dtype)[..., None]
        if valid == columns:
            return each.expand(ctx.shape), None
        return torch.nn.functional.pad(each.expand(*ctx.shape[:-1], valid), (0, columns - valid)), None
