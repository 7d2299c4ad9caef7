"""slime's log-probs and entropy at its own signature: `calculate_log_probs_and_entropy`.

    --custom-megatron-init-path megatron_egrsd.vocab_parallel.adapters.slime.install

As in slime, a group of None is torch.distributed's default group.
"""

from typing import Any

import torch

from megatron_egrsd.vocab_parallel import masked_log_prob, token_statistics
from megatron_egrsd.vocab_parallel.adapters.patching import replace
from megatron_egrsd.vocab_parallel.adapters.tensor_parallel import default_group


def calculate_log_probs_and_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: torch.Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (log-probs [T, 1], entropy [T] or None), fp32, of logits [T, V / TP] and tokens [T]; [0] if T is 0.

    `log_prob_keep_mask` [T, V / TP] is for the log-prob alone: the sampled token is always kept, and the entropy is
    that of all logits. `chunk_size` bounds slime's temporaries; there are none here, so it has no effect.
    """
    if logits.size(0) == 0:
        return logits.new_zeros((0,)), logits.new_zeros((0,)) if with_entropy else None
    options = {"group": default_group(tp_group), "out_of_vocabulary": "zero"}
    tokens = tokens.long()
    if log_prob_keep_mask is not None:
        log_prob = masked_log_prob(logits, log_prob_keep_mask, tokens, **options)
        if not with_entropy:
            return log_prob[:, None], None
    values = token_statistics(logits, tokens, entropy_grad=with_entropy and with_entropy_grad, **options)
    if log_prob_keep_mask is None:
        log_prob = values.log_prob
    return log_prob[:, None], values.entropy if with_entropy else None


def install(args: Any = None) -> None:
    """Replace the function in slime. `args` are slime's arguments, which --custom-megatron-init-path passes."""
    names = {"calculate_log_probs_and_entropy": calculate_log_probs_and_entropy}
    replace("slime.utils.ppo_utils", names)
