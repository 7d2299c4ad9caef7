"""Adapters (LoRA) of a model: their names and shapes in PEFT, and their places in megatron-core.

Every projection of Hugging Face has adapters A [r, in] and B [out, r] of its own, also if megatron-core fuses it with
others, so that no adapter needs converting on the way in or out.
"""

import functools
import hashlib
import math
from dataclasses import dataclass

import torch

from megatron_egrsd.config import LoraConfig
from megatron_egrsd.config.lora import ATTENTION, MLP, TARGETS
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import Copy, Entry, hf_shapes

PREFIX = "base_model.model."  # PEFT's, before the Hugging Face name

# megatron-core's fused linear layer by projection, below "decoder.layers.{i}."
LINEAR = {
    "q_proj": "self_attention.linear_qkv",
    "k_proj": "self_attention.linear_qkv",
    "v_proj": "self_attention.linear_qkv",
    "o_proj": "self_attention.linear_proj",
    "gate_proj": "mlp.linear_fc1",
    "up_proj": "mlp.linear_fc1",
    "down_proj": "mlp.linear_fc2",
}
_MERGED_ROWS = 1024  # merged at a time
ROW_PARALLEL = ("o_proj", "down_proj")  # split over their input; the others over their output


@dataclass(frozen=True)
class AdapterSpec:
    """The form of an adapter: everything but its numbers.

    `targets` are in the order of TARGETS, whatever order they were given in.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in self.targets))

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / self.rank

    def check(self, arch: Architecture, tensor: int = 1) -> None:
        """Raise BadArgument if the model cannot have this adapter on `tensor` tensor-parallel ranks."""
        heads = [name for name in self.targets if LINEAR[name] == LINEAR["q_proj"]]
        if heads and tensor > arch.num_kv_heads:
            raise BadArgument(
                f"lora.targets names {', '.join(heads)}, but parallel.tensor = {tensor} lets ranks share the model's "
                f"{arch.num_kv_heads} key/value heads, which have no adapters then; lower parallel.tensor"
            )
        experts = [name for name in self.targets if name in MLP]
        if arch.num_experts and experts:
            raise BadArgument(
                f"lora.targets names {', '.join(experts)}, but the experts of a mixture get no adapter; "
                f"leave those of attention: {', '.join(ATTENTION)}"
            )


def adapter_spec(lora: LoraConfig) -> AdapterSpec | None:
    """Return the adapter that `lora` describes without reading `lora.init`; None if its rank is 0."""
    if not lora.rank:
        return None
    return AdapterSpec(lora.rank, 2 * lora.rank if lora.alpha is None else lora.alpha, tuple(lora.targets))


def adapted_weights(arch: Architecture, spec: AdapterSpec) -> dict[str, tuple[str, str]]:
    """Return {Hugging Face name of an adapted weight: PEFT names of its A and B}, in the order of the layers."""
    weights = [name for name in hf_shapes(arch) if name.endswith(".weight") and ".experts." not in name]
    names = [name for name in weights if name.split(".")[-2] in spec.targets]
    stems = {name: PREFIX + name.removesuffix("weight") for name in names}
    return {name: (f"{stem}lora_A.weight", f"{stem}lora_B.weight") for name, stem in stems.items()}


def adapter_shapes(arch: Architecture, spec: AdapterSpec) -> dict[str, tuple[int, int]]:
    """Return {PEFT name: shape} of every tensor of the adapter: A [r, in] and B [out, r] of each weight in turn."""
    shapes, found = hf_shapes(arch), {}
    for weight, (a, b) in adapted_weights(arch, spec).items():
        rows, columns = shapes[weight]
        found |= {a: (spec.rank, columns), b: (rows, spec.rank)}
    return found


@functools.cache
def adapter_parameters(arch: Architecture, spec: AdapterSpec) -> int:
    """Return the number of parameters of the adapter."""
    return sum(map(math.prod, adapter_shapes(arch, spec).values()))


def trained_parameters(arch: Architecture, spec: AdapterSpec | None) -> int:
    """Return the number of parameters that are trained: the adapter's, or the model's if `spec` is None."""
    return adapter_parameters(arch, spec) if spec else arch.num_parameters


def adapter_entries(arch: Architecture, spec: AdapterSpec) -> list[Entry]:
    """Return an Entry for every tensor of the adapter, in the order of `adapter_shapes`.

    In megatron-core it is "decoder.layers.{i}.{linear layer}.adapter.{projection}.lora_A" (or B). Tensor parallelism
    splits B of a projection that it splits over its output, A of one that it splits over its input.
    """
    table = []
    for weight, pair in adapted_weights(arch, spec).items():
        _, _, layer, _, projection, _ = weight.split(".")
        split = {"lora_A": 1, "lora_B": None} if projection in ROW_PARALLEL else {"lora_A": None, "lora_B": 0}
        for (name, dim), peft in zip(split.items(), pair, strict=True):
            megatron = f"decoder.layers.{layer}.{LINEAR[projection]}.adapter.{projection}.{name}"
            table.append(Entry(megatron, (peft,), Copy(dim)))
    return table


def initial_tensor(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Return the fp32 values that the tensor of PEFT name `name` begins with: PEFT's, B zero and A Kaiming-uniform.

    They follow from `seed` and the name alone, so that every layout begins with the same adapter.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(_seed(name, seed))
    bound = 1 / math.sqrt(shape[1])  # of kaiming_uniform_(a=sqrt(5))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _seed(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def merged(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return W + scale * B A in `dtype`, default W's: computed in fp64 and rounded once.

    No rank has a part of r, so a shard of W with the fitting shards of A and B gives the same bits as the whole: the
    export of a run in any layout, and a merge from files. fp64 holds a block of rows at a time.
    """
    result, a = torch.empty_like(weight, dtype=dtype or weight.dtype), a.double()
    for into, rows, b_rows in zip(*(t.split(_MERGED_ROWS) for t in (result, weight, b)), strict=True):
        into.copy_(torch.addmm(rows.double(), b_rows.double(), a, alpha=scale))
    return result
