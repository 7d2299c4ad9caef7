"""slime's `calculate_log_probs_and_entropy`, at its own signature, on one read of the logits and one collective.

import slime.utils.ppo_utils as ppo_utils
from examples.reuse import slime_adapter
ppo_utils.calculate_log_probs_and_entropy = slime_adapter.calculate_log_probs_and_entropy  # before the loss imports it
"""

import torch
import torch.distributed as dist

from megatron_egrsd.vocab_parallel import log_prob_and_entropy


def calculate_log_probs_and_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: torch.Tensor | None = None,
    with_entropy_grad: bool = True,
    *,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (log_probs [T, 1], entropy [T] or None), fp32, of logits [T, V / TP] and tokens [T].

    `chunk_size` bounds slime's temporaries; there are none here, so it has no effect. `vocab_size` (keyword only, not
    in slime) leaves the padded columns out. Raises NotImplementedError for a keep mask (top-p replay): write -inf into
    the dropped logits instead, which has the same effect.
    """
    if log_prob_keep_mask is not None:
        raise NotImplementedError("log_prob_keep_mask: set the dropped logits to -inf before the call")
    log_prob, entropy = log_prob_and_entropy(
        logits.contiguous(),
        tokens,
        group=tp_group,
        vocab_size=vocab_size,
        entropy_grad=with_entropy and with_entropy_grad,
    )
    return log_prob[:, None], entropy if with_entropy else None
