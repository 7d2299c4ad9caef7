"""Floating-point operations of a model's passes, from its sizes and the lengths of the sequences. Arithmetic only.

A matrix product of m x k by k x n is 2mkn. Causal attention over a sequence of s tokens is 2 N D s^2 a layer (two
products, half of each masked). A backward pass is two forward passes; one, with adapters: frozen weights have no
gradients.
"""

from collections.abc import Sequence

from megatron_egrsd.hf.adapters import AdapterSpec, adapter_parameters
from megatron_egrsd.hf.architecture import Architecture


def layer_parameters(arch: Architecture) -> tuple[int, int]:
    """Return the number of weights in the layers: those that one token passes through, and all."""
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    every = arch.num_parameters - embeddings
    if not arch.num_experts:
        return every, every
    expert = 3 * arch.hidden_size * arch.expert_intermediate_size * arch.num_layers
    return every - (arch.num_experts - arch.experts_per_token) * expert, every


def forward_flops(arch: Architecture, lengths: Sequence[int], lora: AdapterSpec | None = None) -> float:
    """Return the FLOPs of one forward pass through the layers, and adapters, over sequences of `lengths` tokens."""
    used, _ = layer_parameters(arch)
    adapters = adapter_flops(arch, lengths, lora) if lora else 0.0
    return 2.0 * used * sum(lengths) + attention_flops(arch, lengths) + adapters


def adapter_flops(arch: Architecture, lengths: Sequence[int], lora: AdapterSpec) -> float:
    """Return the FLOPs of the adapters in one forward pass."""
    return 2.0 * adapter_parameters(arch, lora) * sum(lengths)


def attention_flops(arch: Architecture, lengths: Sequence[int]) -> float:
    """Return the FLOPs of the products of queries, keys and values in one forward pass."""
    return 2.0 * arch.num_layers * arch.num_heads * arch.head_dim * sum(n * n for n in lengths)


def training_flops(
    arch: Architecture, lengths: Sequence[int], rows: int, *, recompute: bool, lora: AdapterSpec | None = None
) -> float:
    """Return the FLOPs of a forward and a backward pass over `lengths`, with `rows` rows of the LM head, as run.

    The layers are computed once more under `recompute`, and the LM head's logits always, because they are not kept.
    """
    again = forward_flops(arch, lengths, lora) if recompute else 0.0
    return needed_training_flops(arch, lengths, rows, lora) + again + head_flops(arch, rows)


def needed_training_flops(
    arch: Architecture, lengths: Sequence[int], rows: int, lora: AdapterSpec | None = None
) -> float:
    """Return the FLOPs of `training_flops` if nothing is computed twice, as a utilisation counts them.

    With adapters a frozen weight has no gradient: its products are two, not three.
    """
    if lora is None:
        return 3 * (forward_flops(arch, lengths) + head_flops(arch, rows))
    frozen = 2 * (forward_flops(arch, lengths) + head_flops(arch, rows)) + attention_flops(arch, lengths)
    return frozen + 3 * adapter_flops(arch, lengths, lora)


def head_flops(arch: Architecture, rows: int) -> float:
    """Return the FLOPs of one product of `rows` hidden states with the LM head."""
    return 2.0 * rows * arch.vocab_size * arch.hidden_size
