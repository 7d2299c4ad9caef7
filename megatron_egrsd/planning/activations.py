"""Bytes of a layer's and the LM head's passes, term by term, for memory.py. Arithmetic only.

They follow the tensors that autograd keeps; symbols as there.
"""

from dataclasses import dataclass

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.hf.adapters import ROW_PARALLEL, AdapterSpec
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.vocab_parallel.chunks import chunk_plan


@dataclass(frozen=True)
class Placement:
    """The device and layers of the engine. They determine the kernels and thereby the tensors that exist."""

    gpu: bool
    transformer_engine: bool

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


def norm(width: int, b: int, place: Placement) -> int:
    """Return the bytes per token that an RMSNorm of `width` and the next layer keep: input and normalised output."""
    if place.transformer_engine:
        return 2 * b * width + 4
    return 12 * width + 4  # engine/layers.py computes in fp32: fp32 two copies and bf16 two, or fp32 three


def layer_activations(arch: Architecture, tensor: int, h: int, b: int, place: Placement, context: int = 1) -> int:
    """Return the bytes per token that one layer keeps from forward to backward; `h` = H / TP if sequence parallel.

    Derived as in Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), for RMSNorm, grouped queries, SwiGLU and
    attention that keeps no scores: two norms, queries and keys before their norms and after the rotary embedding,
    values, the attention's output and its log-sum-exp, and the MLP's intermediate results.
    """
    heads, groups = arch.num_heads // tensor, max(1, arch.num_kv_heads // tensor)
    q, kv = heads * arch.head_dim, groups * arch.head_dim
    # Queries before the norm; keys are kept as a view of the whole projection, which ranks that share a head gather.
    shares = tensor > arch.num_kv_heads
    whole = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim if shares else q + 2 * kv
    norms = 2 * norm(h, b, place)
    normed = arch.family.qk_norm  # else nothing needs queries and keys from before the rotary embedding
    if place.transformer_engine:
        # Without these norms the projection is kept for its values alone.
        attention = b * ((q if normed else 0) + whole) + b * (q + kv) + b * q
    else:
        fp32_inputs = 8 * q + 4 * whole + 4 * kv if b == 4 else 10 * (q + kv)
        # The core attention copies queries, keys, values and output into padded batches (engine/layers.py).
        # Under context parallelism it copies the keys and values of all ranks up to the end of each of the two chunks.
        # The masks, which all layers share, are not counted.
        key = q if place.gpu and b == 4 else kv  # torch's fp32 kernels need a key for every query
        copies = 2 * q + key * (2 * context + 1 if context > 1 else 2)
        attention = (fp32_inputs if normed else 0) + b * copies + b * q
        attention += 4 * arch.head_dim * b  # the unfused rotary embedding keeps cosines and sines, twice
    attention += 4 * heads + (4 * (heads + groups) if normed else 0)
    return norms + attention + _mlp(arch, tensor, h, b, place)


def adapter_activations(parallel: ParallelConfig, b: int, lora: AdapterSpec) -> int:
    """Return the bytes per token that the adapters of one layer keep: A x of each projection.

    Its input x is counted with the layer, which keeps it for an adapter if it would for a gradient of W. Sequence
    parallelism divides A x if it divides the layer's output.
    """
    divided = [name in ROW_PARALLEL and parallel.sequence_parallel for name in lora.targets]
    return sum(b * lora.rank // (parallel.tensor if split else 1) for split in divided)


def frozen_norms(arch: Architecture, tensor: int, h: int, b: int, place: Placement) -> int:
    """Return the bytes per token that the norms of a layer keep for the gradients of their weights alone.

    They are the normalised inputs; Transformer Engine computes them again.
    """
    heads, groups = arch.num_heads // tensor, max(1, arch.num_kv_heads // tensor)
    heads_width = (heads + groups) * arch.head_dim if arch.family.qk_norm else 0
    return 0 if place.transformer_engine else b * (2 * h + heads_width)


def frozen_inputs(arch: Architecture, tensor: int, h: int, b: int, lora: AdapterSpec) -> int:
    """Return the bytes per token of the inputs that a layer keeps for gradients of frozen matrices without an adapter.

    They are fc2's input, and of a mixture, whose experts have no adapter, fc1's too. Those of attention and of a dense
    fc1 are kept by other operations, or as part of a norm, and are not counted here.
    """
    if not arch.num_experts:
        return 0 if "down_proj" in lora.targets else b * arch.intermediate_size // tensor
    return arch.experts_per_token * b * (arch.expert_intermediate_size // tensor + h)


def _mlp(arch: Architecture, tensor: int, h: int, b: int, place: Placement) -> int:
    """Return SwiGLU's bytes per token: fc1's output, fc2's input; unfused (CPU) also SiLU's output and linear half."""
    rows = 3 if place.gpu else 5
    if not arch.num_experts:
        return rows * b * arch.intermediate_size // tensor
    # Each token visits k experts: dispatched and returned rows, router probabilities (estimated, not measured).
    k = arch.experts_per_token
    return k * b * (rows * arch.expert_intermediate_size // tensor + 2 * h) + 4 * arch.num_experts


def layer_gradients(arch: Architecture, tensor: int, h: int, b: int) -> int:
    """Return the bytes per token of the gradients alive at once in a layer's backward pass, at its peak in the MLP."""
    experts = arch.experts_per_token if arch.num_experts else 1
    width = (arch.expert_intermediate_size or arch.intermediate_size) * experts // tensor
    return b * (4 * width + 2 * h)


def lm_head(
    arch: Architecture, tensor: int, tokens: int, b: int, place: Placement, frozen: bool = False
) -> dict[str, int]:
    """Return the bytes of vocab_parallel.linear in the backward pass of `tokens` response rows, by name."""
    columns = arch.padded_vocab_size(tensor) // tensor
    held, cast = _logits(place, tokens, columns, b)
    rows = tokens * arch.hidden_size
    head = {
        "LM head: logits kept and one chunk": tokens * (held + cast),
        "LM head: rows and their gradient": rows * (b + 4 + b),
    }
    return head if frozen else head | {"LM head: gradient of the weight": columns * arch.hidden_size * b}


def _logits(place: Placement, rows: int, columns: int, b: int) -> tuple[int, int]:
    """Return bytes a row: of the logits that are held at once, and of a chunk's gradient in the type of the weights."""
    logit = 4 if place.gpu else b
    chunk, kept_chunks = chunk_plan(place.device, rows, columns, logit)
    kept = min(kept_chunks * chunk, columns)
    return (kept + min(chunk, columns - kept)) * logit, chunk * b if logit > b else 0


def divergence_head(
    arch: Architecture, tensor: int, tokens: int, b: int, place: Placement, *, shared: bool, frozen: bool
) -> dict[str, int]:
    """Return the bytes of vocab_parallel.linear_divergence in the backward pass of `tokens` response rows, by name.

    `shared`: one LM head serves both models, whose rows then lie end to end; `frozen`: it is not trained.
    """
    columns = arch.padded_vocab_size(tensor) // tensor
    held, cast = _logits(place, 2 * tokens, columns, b)
    rows = tokens * arch.hidden_size
    head = {
        "divergence: logits kept and one chunk": tokens * (2 * held + cast),
        "divergence: rows and their gradient": rows * (2 * b + (2 * b if shared else 0) + 4 + b),
    }
    return head if frozen else head | {"divergence: gradient of the weight": columns * arch.hidden_size * b}
