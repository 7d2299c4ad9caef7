"""The mapping between a model's tensors in Hugging Face and in megatron-core: names and layouts.

Loading, export, weight synchronisation and conversion all read this table. `join` makes a full (unsharded) megatron
tensor from one or more Hugging Face tensors and `split` is its inverse; `shard` cuts it into tensor-parallel shards
and `unshard` is its inverse. Each pair is exact, byte for byte.

`rows` describes `join` without tensors, for code that copies bytes from file to file: the rows of Hugging Face tensors
that make up the full tensor without padding, in order.

Shapes: H hidden, F intermediate, D head_dim, N heads, G key/value heads, V vocabulary, P its padded rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.families import Family


@dataclass(frozen=True)
class Copy:
    """One tensor on both sides, split over the ranks along `dim`, or replicated if `dim` is None."""

    dim: int | None

    def join(self, tensors: Sequence[torch.Tensor], arch: Architecture, tp: int) -> torch.Tensor:
        return tensors[0]

    def split(self, full: torch.Tensor, arch: Architecture) -> list[torch.Tensor]:
        return [full]

    def groups(self, arch: Architecture) -> int:
        return 1

    def rows(self, sizes: Sequence[int], arch: Architecture) -> list[tuple[int, int, int]]:
        """Return (index of the Hugging Face tensor, first row, end row), in order; `sizes` are the tensors' rows."""
        groups = self.groups(arch)
        return [(i, n // groups * g, n // groups * (g + 1)) for g in range(groups) for i, n in enumerate(sizes)]

    def shard(self, full: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
        return full if self.dim is None else full.chunk(tp, self.dim)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0] if self.dim is None or len(shards) == 1 else torch.cat(list(shards), self.dim)


class Vocabulary(Copy):
    """[V, H] <-> [P, H]: rows beyond the vocabulary are zero in megatron-core and are never exported."""

    def join(self, tensors, arch, tp):
        rows = arch.padded_vocab_size(tp) - arch.vocab_size
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, rows)) if rows else tensors[0]

    def split(self, full, arch):
        return [full[: arch.vocab_size]]


class QKV(Copy):
    """q [N*D, H], k and v [G*D, H] <-> [G * (N/G + 2) * D, H]: the queries of a group, then its key and value.

    Biases, which have no H, are laid out alike.
    """

    def join(self, tensors, arch, tp):
        return torch.cat([t.unflatten(0, (arch.num_kv_heads, -1)) for t in tensors], 1).flatten(0, 1)

    def split(self, full, arch):
        q_rows = arch.num_heads // arch.num_kv_heads * arch.head_dim
        parts = full.unflatten(0, (arch.num_kv_heads, -1)).split([q_rows, arch.head_dim, arch.head_dim], 1)
        return [part.flatten(0, 1) for part in parts]

    def groups(self, arch):
        return arch.num_kv_heads


class GateUp(Copy):
    """gate and up, each [F, H] <-> [2F, H]; a shard holds its rows of gate, then its rows of up."""

    def join(self, tensors, arch, tp):
        return torch.cat(list(tensors))

    def split(self, full, arch):
        return list(full.chunk(2))

    def shard(self, full, rank, tp):
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])

    def unshard(self, shards):
        gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
        return torch.cat([*gates, *ups])


@dataclass(frozen=True)
class Entry:
    """One megatron-core tensor and the Hugging Face tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    layout: Copy

    @property
    def is_expert(self) -> bool:
        """True if the tensor belongs to one expert of a mixture, which tensor parallelism does not split."""
        return ".local_experts." in self.megatron


def _attention(family: Family) -> list[tuple]:
    """Return the rows of the table for a layer's norms and its attention.

    Names are suffixes after "decoder.layers.{i}." (megatron-core's local layers) and "model.layers.{i}.".
    """
    qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
    biases = [("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in qkv), QKV(0))]
    head_norms = [
        ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), Copy(None)),
        ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), Copy(None)),
    ]
    return [
        ("input_layernorm.weight", ("input_layernorm.weight",), Copy(None)),
        ("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in qkv), QKV(0)),
        *(biases if family.qkv_bias else ()),
        *(head_norms if family.qk_norm else ()),
        ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), Copy(1)),
        ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), Copy(None)),
    ]


_ROUTER = ("mlp.router.weight", ("mlp.gate.weight",), Copy(None))


def _mlp(megatron: str, hf: str) -> list[tuple]:
    """Return the rows of the table for the MLP of a layer, or for one of its experts."""
    return [
        (f"{megatron}.linear_fc1.weight", (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"), GateUp(0)),
        (f"{megatron}.linear_fc2.weight", (f"{hf}.down_proj.weight",), Copy(1)),
    ]


# Transformer Engine fuses each norm into the linear layer behind it and renames its weight.
TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

# Transformer Engine's grouped linear layers hold one weight per expert.
_GROUPED_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)")


def entries(arch: Architecture) -> list[Entry]:
    """Return an Entry for every tensor of the model, in the order of the layers, by megatron-core's local names."""
    table = [Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary(0))]
    if arch.num_experts:
        experts = [_mlp(f"mlp.experts.local_experts.{e}", f"mlp.experts.{e}") for e in range(arch.num_experts)]
        layer = [*_attention(arch.family), _ROUTER, *(row for expert in experts for row in expert)]
    else:
        layer = [*_attention(arch.family), *_mlp("mlp", "mlp")]
    for i in range(arch.num_layers):
        for megatron, hf, layout in layer:
            table.append(Entry(f"decoder.layers.{i}.{megatron}", tuple(f"model.layers.{i}.{h}" for h in hf), layout))
    table.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Copy(None)))
    if not arch.tied_embeddings:
        table.append(Entry("output_layer.weight", ("lm_head.weight",), Vocabulary(0)))
    return table


def local_name(name: str) -> str:
    """Return megatron-core's local-layer name for a parameter that any layer implementation has named."""
    if grouped := _GROUPED_EXPERT.fullmatch(name):
        return f"{grouped[1]}.local_experts.{grouped[3]}.{grouped[2]}.weight"
    for engine_suffix, local_suffix in TRANSFORMER_ENGINE_NAMES.items():
        if name.endswith(engine_suffix):
            return name.removesuffix(engine_suffix) + local_suffix
    return name


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of the Hugging Face checkpoint."""
    hidden, ffn = arch.hidden_size, arch.expert_intermediate_size or arch.intermediate_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    by_suffix = {
        "embed_tokens.weight": (arch.vocab_size, hidden),
        "lm_head.weight": (arch.vocab_size, hidden),
        "q_proj.weight": (q, hidden),
        "k_proj.weight": (kv, hidden),
        "v_proj.weight": (kv, hidden),
        "q_proj.bias": (q,),
        "k_proj.bias": (kv,),
        "v_proj.bias": (kv,),
        "o_proj.weight": (hidden, q),
        "q_norm.weight": (arch.head_dim,),
        "k_norm.weight": (arch.head_dim,),
        "gate.weight": (arch.num_experts, hidden),
        "gate_proj.weight": (ffn, hidden),
        "up_proj.weight": (ffn, hidden),
        "down_proj.weight": (hidden, ffn),
    }
    names = [name for entry in entries(arch) for name in entry.hf]
    return {n: by_suffix.get(".".join(n.split(".")[-2:]), (hidden,)) for n in names}
