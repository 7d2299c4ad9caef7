"""Log-probability of the target and entropy of the full distribution from logits sharded over the vocabulary."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_egrsd.vocab_parallel import ops
from megatron_egrsd.vocab_parallel.collectives import gather_parts
from megatron_egrsd.vocab_parallel.shard import Shard, check_logits, check_target, check_temperature


class LogRatio(NamedTuple):
    """Per-token results of `log_ratio`, each [...] fp32 in nats, without gradient."""

    log_ratio: torch.Tensor  # teacher_log_prob - student_log_prob
    teacher_entropy: torch.Tensor
    teacher_log_prob: torch.Tensor
    student_log_prob: torch.Tensor


def log_prob_and_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax(logits / temperature)[target] and the entropy of that softmax, both [...] fp32 in nats.

    Reads each logit once and makes one all-gather of four floats a token; backward makes no collective.

    logits            [..., V / ranks], fp32, bf16 or fp16, rows contiguous: this rank's columns
    target            [...] int64, global ids; -100 gives exact zeros (value and gradient); equal on all ranks
    group             tensor-parallel group in vocabulary order; None for one shard
    vocab_size        valid global vocabulary; the columns beyond it are padding: ignored, with zero gradient
    entropy_grad      let the entropy carry a gradient (off by default: the entropy is usually only logged)
    inplace_backward  backward writes the gradient over the logits, so they must not be used after it

    Raises ValueError on a bad dtype, shape, stride, vocab_size, temperature or target id (see `shard.check_target`).
    A row with NaN or +inf, and a row without any finite logit, gives NaN for that row only.
    """
    check_logits("logits", logits)
    check_temperature(temperature)
    shard = Shard.of(logits.shape[-1], group, vocab_size)
    check_target(target, logits.shape[:-1], "logits' leading dimensions", logits.device, shard.vocab_size)
    rows = logits.view(-1, shard.columns)
    if inplace_backward and rows.shape[0] > 1 and rows.stride(0) < shard.columns:
        raise ValueError(f"inplace_backward needs logits whose rows do not overlap, got strides {logits.stride()}")
    log_prob_N, entropy_N = _LogProbAndEntropy.apply(
        rows, target.reshape(-1), shard, temperature, entropy_grad, inplace_backward
    )
    return log_prob_N.view(target.shape), entropy_N.view(target.shape)


class _LogProbAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, target_N, shard, temperature, entropy_grad, inplace):
        part_N4 = ops.statistics(logits_NV, target_N, shard, temperature)
        statistics_N4, log_prob_N, entropy_N = ops.combine(gather_parts(part_N4, shard))
        ctx.save_for_backward(logits_NV, target_N, statistics_N4)
        ctx.shard, ctx.temperature, ctx.entropy_grad, ctx.inplace = shard, temperature, entropy_grad, inplace
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return log_prob_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_prob_N, grad_entropy_N):
        logits_NV, target_N, statistics_N4 = ctx.saved_tensors
        grad_NV = ops.logits_grad(
            logits_NV, target_N, statistics_N4, grad_log_prob_N.contiguous(),
            grad_entropy_N.contiguous() if ctx.entropy_grad else None,
            ctx.shard, ctx.temperature, inplace=ctx.inplace,
        )  # fmt: skip
        return grad_NV, None, None, None, None, None


@torch.no_grad()
def log_ratio(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    target: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> LogRatio:
    """Compute log p_teacher(target) - log p_student(target), both terms and the teacher's entropy, without gradient.

    One all-gather for both models. Arguments and errors as in `log_prob_and_entropy`; the two logits tensors have
    equal shapes and may differ in dtype.
    """
    check_logits("teacher_logits", teacher_logits)
    check_logits("student_logits", student_logits)
    if teacher_logits.shape != student_logits.shape or teacher_logits.device != student_logits.device:
        raise ValueError(
            f"teacher_logits {tuple(teacher_logits.shape)} on {teacher_logits.device} and student_logits "
            f"{tuple(student_logits.shape)} on {student_logits.device} must have one shape and device"
        )
    check_temperature(temperature)
    shard = Shard.of(teacher_logits.shape[-1], group, vocab_size)
    check_target(target, teacher_logits.shape[:-1], "teacher_logits", teacher_logits.device, shard.vocab_size)
    target_N = target.reshape(-1)
    part_2N4 = torch.stack(
        [
            ops.statistics(logits.view(-1, shard.columns), target_N, shard, temperature)
            for logits in (teacher_logits, student_logits)
        ]
    )
    _, log_prob, entropy = ops.combine(gather_parts(part_2N4.view(-1, 4), shard))
    teacher_log_prob, student_log_prob = log_prob.view(2, *target.shape)
    teacher_entropy = entropy.view(2, *target.shape)[0]
    return LogRatio(teacher_log_prob - student_log_prob, teacher_entropy, teacher_log_prob, student_log_prob)
