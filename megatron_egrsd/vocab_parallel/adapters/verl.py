"""verl's vocab-parallel functions and its fused linear cross-entropy, at their own signatures.

    VERL_USE_EXTERNAL_MODULES=megatron_egrsd.vocab_parallel.adapters.verl_workers    # in every process of verl

verl imports the modules of this variable first, in its workers too, so the names that they bind are the replaced ones.
"""

from typing import Any

import torch

from megatron_egrsd.vocab_parallel import linear_token_statistics, token_statistics
from megatron_egrsd.vocab_parallel.adapters.patching import replace
from megatron_egrsd.vocab_parallel.adapters.tensor_parallel import megatron_group


def vocab_parallel_log_probs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits)[labels], [...] fp32, of logits [..., V / TP]. The logits are not changed."""
    return token_statistics(logits, labels.long(), group=megatron_group(), out_of_vocabulary="zero").log_prob


def vocab_parallel_entropy(vocab_parallel_logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of softmax(logits) in nats, [...] fp32, with gradient. The logits are not changed."""
    return token_statistics(vocab_parallel_logits, group=megatron_group(), entropy_grad=True).entropy


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: torch.Tensor, chunk_size: int = 2048) -> torch.Tensor:
    """Return `vocab_parallel_entropy(logits)`. `chunk_size` has no effect: there are no temporaries to bound."""
    return vocab_parallel_entropy(vocab_parallel_logits)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probs, entropies [N]) of hidden [..., D], weight [V / TP, D] and labels [...], both flattened.

    The log-probs are [N], or reduced by "sum" or "mean". As in verl, the gradient of `hidden` is this rank's part:
    the caller sums it over the group. A temperature per token ([...]) is taken, too.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"Invalid reduction: {reduction}")
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1)
    values = linear_token_statistics(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        group=dist_process_group,
        temperature=temperature,
        entropy_grad=True,
        reduce_hidden_grad=False,
        logits_dtype=torch.float32,
        out_of_vocabulary="zero",
    )
    log_prob = values.log_prob
    return log_prob if reduction == "none" else getattr(log_prob, reduction)(), values.entropy


def install() -> None:
    """Replace the functions in verl, in this process."""
    functions = (vocab_parallel_log_probs_from_logits, vocab_parallel_entropy, vocab_parallel_entropy_with_chunking)
    replace(
        "verl.utils.megatron.tensor_parallel",
        {f.__name__: f for f in functions},
        newer={"vocab_parallel_entropy_with_chunking"},
    )
    replace("verl.utils.kernel.linear_cross_entropy", {"linear_cross_entropy": linear_cross_entropy})
