"""verl's `vocab_parallel_log_probs_from_logits` and `vocab_parallel_entropy`, at their own signatures.

    import verl.utils.megatron.tensor_parallel as tensor_parallel
    from examples.reuse import verl_adapter
    tensor_parallel.vocab_parallel_log_probs_from_logits = verl_adapter.vocab_parallel_log_probs_from_logits
    tensor_parallel.vocab_parallel_entropy = verl_adapter.vocab_parallel_entropy

Unlike verl's functions, neither writes to the logits, so no clone is needed between the two calls. Use
`log_probs_and_entropy` for both: it costs one read and one collective instead of two.
"""

import torch
from megatron.core import parallel_state

from megatron_egrsd.vocab_parallel import log_prob_and_entropy


def log_probs_and_entropy(
    vocab_parallel_logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probs, entropy), [...] fp32 with gradient, of logits [..., V / TP] and labels [...] (global ids)."""
    group = parallel_state.get_tensor_model_parallel_group()
    return log_prob_and_entropy(vocab_parallel_logits, labels, group=group, entropy_grad=True)


def vocab_parallel_log_probs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits)[labels], [...] fp32."""
    group = parallel_state.get_tensor_model_parallel_group()
    return log_prob_and_entropy(logits, labels, group=group)[0]


def vocab_parallel_entropy(vocab_parallel_logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of softmax(logits) in nats, [...] fp32."""
    any_id = torch.zeros(vocab_parallel_logits.shape[:-1], dtype=torch.int64, device=vocab_parallel_logits.device)
    return log_probs_and_entropy(vocab_parallel_logits, any_id)[1]
