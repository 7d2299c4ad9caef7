"""Hugging Face weights straight into any TP x PP x EP layout, and out of it again, adapters too, as a stream."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_egrsd.engine.adapters import LinearAdapter
from megatron_egrsd.engine.distributed import gather
from megatron_egrsd.errors import RunError
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_entries
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.hf.mapping import Entry, entries, local_name

_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")


def _own_experts(arch: Architecture) -> int:
    """Return the number of experts per layer on each expert-parallel rank."""
    return arch.num_experts // parallel_state.get_expert_model_parallel_world_size()


@dataclass(frozen=True)
class WeightShard:
    """A parameter of this rank with its place in a table of entries."""

    entry: Entry
    parameter: torch.nn.Parameter
    chunk: int  # the chunk of layers that holds it,
    name: str  # and its name there
    adapter: LinearAdapter | None = None  # of the linear layer whose weight it is

    def value(self) -> torch.Tensor:
        """Return the values that leave the engine: those of the parameter, with its adapter added in."""
        values = self.parameter.detach()
        return values if self.adapter is None else self.adapter.merge(values)


def own_shards(
    chunks: list[torch.nn.Module], arch: Architecture, adapter: AdapterSpec | None = None
) -> list[WeightShard]:
    """Return this stage's parameters, in the order of the table, which the export must keep.

    They are those of the model or, for an `adapter`, those of the adapter alone. The last stage of a tied model holds a
    copy of the embedding as output_layer.weight; it maps to the same entry.
    """
    table = _table(arch, adapter)
    if arch.tied_embeddings and not adapter:
        table["output_layer.weight"] = table["embedding.word_embeddings.weight"]
    first_expert = parallel_state.get_expert_model_parallel_rank() * _own_experts(arch)
    own = []
    for number, chunk in enumerate(chunks):
        first_layer = chunk.decoder.layers[0].layer_number - 1
        for name, parameter in chunk.named_parameters():
            if (".adapter." in name) != bool(adapter):
                continue
            place = re.sub(r"(?<=decoder\.layers\.)\d+", _plus(first_layer), local_name(name))
            place = _EXPERT.sub(_plus(first_expert), place)
            if place not in table:
                raise RunError(f"megatron-core calls a parameter {place}, which the weight mapping does not know")
            owner, _, kind = name.rpartition(".")
            beside = getattr(chunk.get_submodule(owner), "adapter", None) if kind == "weight" else None
            own.append(WeightShard(table[place], parameter, number, name, beside))
    order = {name: i for i, name in enumerate(table)}  # megatron-core registers a layer's parameters in another one
    return sorted(own, key=lambda shard: order[shard.entry.megatron])


def _table(arch: Architecture, adapter: AdapterSpec | None) -> dict[str, Entry]:
    """Return the entries of the model or, for an `adapter`, of its tensors, by megatron-core's name."""
    return {entry.megatron: entry for entry in (adapter_entries(arch, adapter) if adapter else entries(arch))}


@torch.no_grad()
def load_hf(chunks: list[torch.nn.Module], checkpoint: HFCheckpoint) -> None:
    """Fill this rank's parameters from the checkpoint, reading only the tensors of this stage."""
    arch, group = checkpoint.architecture, parallel_state.get_tensor_model_parallel_group()
    for own in own_shards(chunks, arch):
        entry, parameter = own.entry, own.parameter
        rank, tp = (0, 1) if entry.is_expert else (group.rank(), group.size())
        full = entry.layout.join([checkpoint[name] for name in entry.hf], arch, tp)
        shard = entry.layout.shard(full, rank, tp)
        if shard.shape != parameter.shape:
            raise RunError(
                f"{entry.megatron}: the mapping gives {list(shard.shape)}, megatron-core has {list(parameter.shape)}"
            )
        parameter.copy_(shard)


def export_hf(
    chunks: list[torch.nn.Module], arch: Architecture, *, adapted_only: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, full tensor) in model order on rank 0, adapters added in.

    Every other rank gets the same names with tensors on the meta device, of the same shapes and types, and must exhaust
    the iterator. With `adapted_only` the weights without an adapter are left out.
    """
    own = [shard for shard in own_shards(chunks, arch) if shard.adapter or not adapted_only]
    return _export(own, _table(arch, None), arch)


def export_adapter(
    chunks: list[torch.nn.Module], arch: Architecture, adapter: AdapterSpec
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (PEFT name, full tensor) of the adapter, as `export_hf` does."""
    return _export(own_shards(chunks, arch, adapter), _table(arch, adapter), arch)


@torch.no_grad()
def _export(own: list[WeightShard], table: dict[str, Entry], arch: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather this stage's shards, and those of all other stages, in the order of `table`.

    Only the first replica works, of experts the first one of theirs; one full tensor (of experts, one of each rank) is
    alive at a time, plus whatever the consumer keeps.
    """
    is_first = {
        False: parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0,
        True: parallel_state.get_expert_data_parallel_rank() == 0,
    }
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stage = pipeline.rank()
    is_writer = is_first[False] and parallel_state.get_tensor_model_parallel_rank() == 0
    plans = gather([(shard.entry.megatron, _full_shape(shard), shard.parameter.dtype) for shard in own], pipeline)
    # From the last to the first: of a tied embedding, the first stage's copy counts.
    holders = {
        name: (source, i, torch.empty(shape, dtype=dtype, device="meta"))
        for source in reversed(range(len(plans)))
        for i, (name, shape, dtype) in enumerate(plans[source])
    }
    for name in (name for name in table if name in holders):
        source, position, placeholder = holders[name]
        names = _names_on_expert_ranks(table[name], arch)
        gives = source == stage and is_first[table[name].is_expert]
        fulls = (_gather(own[position]) if gives else None) or [None] * len(names)
        for tensor, full in zip(names, fulls, strict=True):
            if is_writer and source != 0:
                full = _move_to_first_stage(full, placeholder, source, pipeline)
            if not (is_writer and stage == 0):
                full = placeholder
            yield from zip(table[tensor].hf, table[tensor].layout.split(full, arch), strict=True)


def _plus(first: int) -> Callable[[re.Match[str]], str]:
    """Return a function that adds `first` to a matched number."""
    return lambda match: str(int(match[0]) + first)


def _full_shape(shard: WeightShard) -> list[int]:
    """Return the shape of the full tensor."""
    entry, shape = shard.entry, list(shard.parameter.shape)
    if not entry.is_expert and entry.layout.dim is not None:
        shape[entry.layout.dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return shape


def _names_on_expert_ranks(entry: Entry, arch: Architecture) -> list[str]:
    """Return the entry's name, or the names of the matching experts of all expert-parallel ranks."""
    if not entry.is_expert:
        return [entry.megatron]
    own = _own_experts(arch)
    place = int(_EXPERT.search(entry.megatron)[0]) % own
    return [_EXPERT.sub(str(expert), entry.megatron) for expert in range(place, arch.num_experts, own)]


def _gather(own: WeightShard) -> list[torch.Tensor] | None:
    """Gather the full tensor; for an expert, those of all expert-parallel ranks, on their first rank (else None)."""
    entry, shard = own.entry, own.value().contiguous()
    if entry.is_expert:
        group = parallel_state.get_expert_model_parallel_group()
        fulls = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
        dist.gather(shard, fulls, group_dst=0, group=group)
        return fulls
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or entry.layout.dim is None:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard, group=group)
    return [entry.layout.unshard(shards)]


def _move_to_first_stage(
    full: torch.Tensor | None, placeholder: torch.Tensor, source: int, pipeline: dist.ProcessGroup
) -> torch.Tensor | None:
    """Send the tensor from stage `source` to stage 0; `placeholder` gives shape and dtype."""
    first, sender = dist.get_global_rank(pipeline, 0), dist.get_global_rank(pipeline, source)
    if pipeline.rank() == source:
        dist.send(full.contiguous(), dst=first, group=pipeline)
    elif pipeline.rank() == 0:
        full = torch.empty_like(placeholder, device=torch.cuda.current_device())
        dist.recv(full, src=sender, group=pipeline)
    return full
