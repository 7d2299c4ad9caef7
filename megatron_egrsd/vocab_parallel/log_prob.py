"""Log-probability, entropy and log-normaliser of every token from logits sharded over the vocabulary."""

from typing import Any, NamedTuple

import torch

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts
from megatron_egrsd.vocab_parallel.rows import overlap
from megatron_egrsd.vocab_parallel.shard import (
    IGNORE_INDEX,
    Shard,
    check_logits,
    prepare_target,
    prepare_temperature,
)


class TokenStatistics(NamedTuple):
    """Per-token results, each [...] fp32 in nats."""

    log_prob: torch.Tensor | None  # log softmax(logits / temperature)[target]; None without a target
    entropy: torch.Tensor
    log_normalizer: torch.Tensor  # ln sum_j exp(logits_j / temperature)


class LogRatio(NamedTuple):
    """Per-token results of `log_ratio`, each [...] fp32 in nats, without gradient."""

    log_ratio: torch.Tensor  # teacher_log_prob - student_log_prob
    teacher_entropy: torch.Tensor
    teacher_log_prob: torch.Tensor
    student_log_prob: torch.Tensor


def token_statistics(
    logits: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float | torch.Tensor = 1.0,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
    ignore_index: int = IGNORE_INDEX,
    out_of_vocabulary: str = "error",
) -> TokenStatistics:
    """Compute log softmax(logits / temperature)[target], that softmax's entropy and its log-normaliser.

    Reads each logit once and makes one all-gather of four floats a token; backward makes no collective. The
    log-normaliser has a gradient, so that one read serves a z-loss or any number of ids (log p = x / temperature -
    log-normaliser).

    logits             [..., V / ranks], fp32, bf16 or fp16, rows contiguous: this rank's columns. The leading
                       dimensions may have any strides that merge into two, as logits[:, :-1] and a transpose have
    target             [...] int64, global ids, equal on all ranks; `ignore_index` gives exact zeros in every value
                       and gradient. None: no log-prob
    group              tensor-parallel group in vocabulary order, or an object with rank() and size(); None: one shard
    vocab_size         valid global vocabulary; the columns beyond it are padding: ignored, with zero gradient
    temperature        a number, or one per token: [...] without gradient
    entropy_grad       let the entropy carry a gradient (off by default: the entropy is usually only logged)
    inplace_backward   backward writes the gradient over the logits; a later use of them in autograd raises
    out_of_vocabulary  "error": an id outside [0, vocab_size) raises (see `shard.check_target`). "zero": its log-prob
                       is 0 without a gradient; entropy and log-normaliser are the row's

    Raises ValueError on a bad dtype, shape, stride, vocab_size, temperature or target id.
    """
    check_logits("logits", logits)
    shard = Shard.of(logits.shape[-1], group, vocab_size)
    tokens_shape = logits.shape[:-1]
    temperature = prepare_temperature(temperature, tokens_shape)
    target_N = None
    if target is not None:
        target_N = prepare_target(
            target, tokens_shape, "logits' leading dimensions", logits.device, shard.vocab_size,
            ignore_index, out_of_vocabulary,
        )  # fmt: skip
    if inplace_backward and overlap(logits):
        raise ValueError(f"inplace_backward needs logits whose rows do not overlap, got strides {logits.stride()}")
    results = _TokenStatistics.apply(logits, target_N, shard, temperature, entropy_grad, inplace_backward)
    log_prob, entropy, log_normalizer = (x.view(tokens_shape) for x in results)
    if target is None:
        return TokenStatistics(None, entropy, log_normalizer)
    if out_of_vocabulary == "zero":
        log_prob = zero_where_unknown(log_prob, target_N)
    return TokenStatistics(log_prob, entropy, log_normalizer)


def log_prob_and_entropy(
    logits: torch.Tensor, target: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first two of `token_statistics(logits, target, **options)`."""
    log_prob, entropy, _ = token_statistics(logits, target, **options)
    return log_prob, entropy


def zero_where_unknown(log_prob: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Set log-probs of prepared targets that are in no shard to zero, and their gradient."""
    unknown_N = (target_N < 0) & (target_N != IGNORE_INDEX)
    return log_prob.masked_fill(unknown_N.view(log_prob.shape), 0.0)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_N, shard, temperature, entropy_grad, inplace):
        part_N4 = ops.statistics(logits, target_N, shard, temperature)
        statistics_N4, log_prob_N, entropy_N, log_normalizer_N = ops.combine(gather_parts(part_N4, shard))
        per_token = isinstance(temperature, torch.Tensor)
        ctx.save_for_backward(logits, target_N, statistics_N4, temperature if per_token else None)
        ctx.temperature = None if per_token else temperature
        ctx.shard, ctx.entropy_grad, ctx.inplace = shard, entropy_grad, inplace
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return log_prob_N, entropy_N, log_normalizer_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_prob_N, grad_entropy_N, grad_log_normalizer_N):
        logits, target_N, statistics_N4, temperature_N = ctx.saved_tensors
        given = (grad_log_prob_N, grad_entropy_N if ctx.entropy_grad else None, grad_log_normalizer_N)
        gradients = ops.Gradients(*(None if g is None else g.contiguous() for g in given))
        temperature = ctx.temperature if temperature_N is None else temperature_N
        grad = ops.logits_grad(
            logits, target_N, statistics_N4, gradients, ctx.shard, temperature, inplace=ctx.inplace
        )  # fmt: skip
        return grad, None, None, None, None, None


@torch.no_grad()
def log_ratio(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Any = None,
    vocab_size: int | None = None,
    temperature: float | torch.Tensor = 1.0,
) -> LogRatio:
    """Compute log p_teacher(target) - log p_student(target), both terms and the teacher's entropy, without gradient.

    One all-gather for both models. Arguments and errors as in `token_statistics`; the two logits tensors have
    equal shapes and may differ in dtype.
    """
    check_logits("teacher_logits", teacher_logits)
    check_logits("student_logits", student_logits)
    if teacher_logits.shape != student_logits.shape or teacher_logits.device != student_logits.device:
        raise ValueError(
            f"teacher_logits {tuple(teacher_logits.shape)} on {teacher_logits.device} and student_logits "
            f"{tuple(student_logits.shape)} on {student_logits.device} must have one shape and device"
        )
    shard = Shard.of(teacher_logits.shape[-1], group, vocab_size)
    temperature = prepare_temperature(temperature, target.shape)
    target_N = prepare_target(
        target, teacher_logits.shape[:-1], "teacher_logits", teacher_logits.device, shard.vocab_size,
        IGNORE_INDEX, "error",
    )  # fmt: skip
    parts = [ops.statistics(logits, target_N, shard, temperature) for logits in (teacher_logits, student_logits)]
    _, log_prob, entropy, _ = ops.combine(gather_parts(torch.cat(parts), shard))
    teacher_log_prob, student_log_prob = log_prob.view(2, *target.shape)
    teacher_entropy = entropy.view(2, *target.shape)[0]
    return LogRatio(teacher_log_prob - student_log_prob, teacher_entropy, teacher_log_prob, student_log_prob)
