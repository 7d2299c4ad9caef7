"""miles' log-probs and entropy at its own signature: `calculate_log_probs_and_entropy`.

--custom-megatron-init-path megatron_egrsd.vocab_parallel.adapters.miles.install
"""

import sys
from typing import Any

import torch

from megatron_egrsd.vocab_parallel.adapters import slime
from megatron_egrsd.vocab_parallel.adapters.patching import replace

_MODULE = "miles.backends.training_utils.loss_hub.math_utils"


def calculate_log_probs_and_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    entropy_requires_grad: bool = True,
    chunk_size: int = -1,
    true_on_policy: bool = False,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (log-probs [T, 1], entropy [T] or None), fp32, of logits [T, V / TP] and tokens [T]; [0] if T is 0.

    `true_on_policy` asks for SGLang's own order of operations, bit for bit: miles' function is called for it. As in
    miles, `vocab_size` acts only there. `chunk_size` has no effect.
    """
    if true_on_policy:
        exact = sys.modules[_MODULE]._calculate_log_probs_and_entropy_true_on_policy
        return exact(
            logits, tokens, tp_group, with_entropy=with_entropy, entropy_requires_grad=entropy_requires_grad,
            vocab_size=vocab_size,
        )  # fmt: skip
    return slime.calculate_log_probs_and_entropy(
        logits, tokens, tp_group, with_entropy, with_entropy_grad=entropy_requires_grad
    )


def install(args: Any = None) -> None:
    """Replace the function in miles. `args` are miles' arguments, which --custom-megatron-init-path passes."""
    replace(_MODULE, {"calculate_log_probs_and_entropy": calculate_log_probs_and_entropy})
