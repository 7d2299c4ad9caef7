"""AReaL's log-probs and entropy at their own signatures: `gather_logprobs` and `gather_logprobs_entropy`.

from megatron_egrsd.vocab_parallel.adapters import areal
areal.install()              # at the top of the training script and of its workers
"""

from typing import Any

import torch

from megatron_egrsd.vocab_parallel import token_statistics
from megatron_egrsd.vocab_parallel.adapters.patching import replace


def gather_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Return log softmax(logits / temperature)[labels], [...] fp32. `chunk_size` has no effect."""
    return token_statistics(
        logits, labels.long(), group=tp_group, temperature=temperature, out_of_vocabulary="zero"
    ).log_prob


def gather_logprobs_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probs, entropy), [...] fp32, both with gradient. `chunk_size` has no effect."""
    values = token_statistics(
        logits, labels.long(), group=tp_group, temperature=temperature, entropy_grad=True, out_of_vocabulary="zero"
    )
    return values.log_prob, values.entropy


def _vocab_parallel_logprobs(vocab_parallel_logits, labels, tp_group, temperature=1.0):
    return gather_logprobs(vocab_parallel_logits, labels, temperature, tp_group)


def _vocab_parallel_logprobs_entropy(vocab_parallel_logits, labels, tp_group, temperature=1.0):
    return gather_logprobs_entropy(vocab_parallel_logits, labels, temperature, tp_group)


def install() -> None:
    """Replace the functions in AReaL, in this process, and the private ones that its tree attention imports."""
    replacements = (
        gather_logprobs, gather_logprobs_entropy, _vocab_parallel_logprobs, _vocab_parallel_logprobs_entropy
    )  # fmt: skip
    replace("areal.utils.functional.vocab_parallel", {r.__name__: r for r in replacements})
