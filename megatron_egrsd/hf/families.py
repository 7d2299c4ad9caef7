"""The model families that can be trained, and what sets each apart: the only place that knows."""

from dataclasses import dataclass

from megatron_egrsd.errors import BadArgument


@dataclass(frozen=True)
class Family:
    """A family of decoders with RMSNorm, rotary embeddings, grouped queries and SwiGLU.

    Args:
        name: Name in messages.
        architecture: The model class that config.json names.
        qk_norm: Whether every head's queries and keys have an RMSNorm.
        qkv_bias: Whether the projections of queries, keys and values have a bias.
        experts: Whether the MLPs are mixtures of experts.
        rope_theta: Base of the rotary embedding if config.json gives none.
    """

    name: str
    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    rope_theta: float = 10_000.0


FAMILIES = (
    Family("Qwen3", "Qwen3ForCausalLM", qk_norm=True, rope_theta=1_000_000.0),
    Family("Qwen3", "Qwen3MoeForCausalLM", qk_norm=True, experts=True, rope_theta=1_000_000.0),
    Family("Qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    Family("Llama", "LlamaForCausalLM"),
)

# Variants that the architectures allow and the engine lacks: keys of config.json that must be absent or false.
_OUTSIDE = ("attention_bias", "mlp_bias", "use_sliding_window", "use_mrope", "rope_interleaved")


def family_of(config: dict, source: str) -> Family:
    """Return the family of a decoded config.json. Raises BadArgument, naming `source`, for a model outside of all."""
    architectures = config.get("architectures") or ["nothing"]
    found = [family for family in FAMILIES if architectures == [family.architecture]]
    if not found:
        *others, last = (family.architecture for family in FAMILIES)
        raise BadArgument(
            f"{source} describes {', '.join(map(str, architectures))}; "
            f"only {', '.join(others)} and {last} are supported"
        )
    for key in _OUTSIDE:
        if config.get(key):
            raise BadArgument(f"{source} sets {key}, which is not supported for {found[0].architecture}")
    if config.get("hidden_act", "silu") != "silu":
        raise BadArgument(f"{source} sets hidden_act {config['hidden_act']!r}; only silu is supported")
    if layers := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise BadArgument(f"{source} has layers with {min(layers)}; only full attention is supported")
    return found[0]
