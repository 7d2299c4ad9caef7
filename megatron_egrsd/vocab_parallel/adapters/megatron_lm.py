"""Megatron-LM's cross-entropies at their own signatures, and an output processor that leaves the logits out.

    from megatron_egrsd.vocab_parallel.adapters import megatron_lm
    megatron_lm.install()        # before the training starts, on every rank

An id outside the vocabulary has loss 0 and no gradient. Megatron's value there is an artefact (log sum exp(x - max x),
with the gradient of a softmax), which its loss masks hide.
"""

import functools
from typing import Any

import torch

from megatron_egrsd.vocab_parallel import cross_entropy, linear_token_statistics
from megatron_egrsd.vocab_parallel.adapters.patching import replace
from megatron_egrsd.vocab_parallel.adapters.tensor_parallel import megatron_group


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float = 0.0,
    tp_group: Any = None,
    *,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """Return the cross-entropy [s, b] fp32 of logits [s, b, V / TP] and target [s, b], as megatron.core's function.

    The logits are not changed. Padded columns take part, as in Megatron, unless `vocab_size` leaves them out.
    `inplace_backward` saves a tensor of the logits' size. Label smoothing is the mean over the whole vocabulary;
    Megatron's is the mean over a rank's own columns, so that at TP > 1 its ranks differ.
    """
    return cross_entropy(
        vocab_parallel_logits,
        target.long(),
        label_smoothing=label_smoothing,
        group=megatron_group() if tp_group is None else tp_group,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward and not label_smoothing,
        out_of_vocabulary="zero",
    )


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group: Any, **options: Any
) -> torch.Tensor:
    """Return what `vocab_parallel_cross_entropy` returns, with the gradient in the logits' dtype and not in bf16."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group, **options)


def output_processor(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    config: Any,
    context: dict[str, Any] | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the loss [b, s] of a GPTModel without its logits: `GPTModel.forward(output_processor=output_processor)`.

    Takes tied weights, sequence parallelism and gradient accumulation fusion from the arguments that GPTModel passes.
    `context` may hold options of `linear_token_statistics`, such as vocab_size or keep_bytes. Raises ValueError
    without labels, and if the output layer does more than a product.
    """
    if labels is None:
        raise ValueError("output_processor computes a loss, so the model must be called with labels")
    if getattr(output_layer, "bias", None) is not None or getattr(config, "use_mup", False):
        raise ValueError("output_processor computes hidden @ weight.T: it has no bias and no muP scale")
    weight = output_layer.weight if output_weight is None else output_weight
    log_prob = linear_token_statistics(
        hidden_states,
        weight,
        labels.transpose(0, 1).long().contiguous(),
        group=getattr(output_layer, "tp_group", None) or megatron_group(),
        sequence_parallel=output_layer.sequence_parallel,
        main_grad=bool(getattr(config, "gradient_accumulation_fusion", False)) and weight.requires_grad,
        out_of_vocabulary="zero",
        **(context or {}),
    ).log_prob
    return -log_prob.transpose(0, 1).contiguous()


def install(*, vocab_size: int | None = None, inplace_backward: bool = False) -> None:
    """Replace both cross-entropies of megatron-core; the options are those of `vocab_parallel_cross_entropy`.

    Reaches models that are built already, too. Transformer Engine's own cross-entropy stays in place.
    """
    options: dict[str, Any] = {"vocab_size": vocab_size, "inplace_backward": inplace_backward}
    plain = functools.partial(vocab_parallel_cross_entropy, **options)
    fused = functools.partial(fused_vocab_parallel_cross_entropy, **options)
    replace("megatron.core.tensor_parallel.cross_entropy", {"vocab_parallel_cross_entropy": plain})
    replace("megatron.core.fusions.fused_cross_entropy", {"fused_vocab_parallel_cross_entropy": fused})
