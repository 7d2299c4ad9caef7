"""Hugging Face weights straight into any TP x PP layout, and out of it again as a stream."""

import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_egrsd.errors import RunError
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.hf.mapping import Entry, entries, local_name


def _own_entries(module: torch.nn.Module, arch: Architecture) -> list[tuple[Entry, torch.nn.Parameter]]:
    """This stage's parameters with their place in the mapping, in its order, which the export must keep.

    The last stage of a tied model holds a copy of the embedding as output_layer.weight; it maps to the same entry.
    """
    table = {entry.megatron: entry for entry in entries(arch)}
    if arch.tied_embeddings:
        table["output_layer.weight"] = table["embedding.word_embeddings.weight"]
    first_layer = module.decoder.layers[0].layer_number - 1 if len(module.decoder.layers) else 0
    own = []
    for name, parameter in module.named_parameters():
        name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m[0]) + first_layer), local_name(name))
        if name not in table:
            raise RunError(f"megatron-core calls a parameter {name}, which the weight mapping does not know")
        own.append((table[name], parameter))
    order = {name: i for i, name in enumerate(table)}  # megatron-core registers a layer's parameters in another one
    return sorted(own, key=lambda pair: order[pair[0].megatron])


@torch.no_grad()
def load_hf(module: torch.nn.Module, checkpoint: HFCheckpoint) -> None:
    """Fill this rank's parameters from the checkpoint, reading only the tensors of this stage."""
    arch, tp = checkpoint.architecture, parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for entry, parameter in _own_entries(module, arch):
        full = entry.layout.join([checkpoint[name] for name in entry.hf], arch, tp)
        shard = entry.layout.shard(full, rank, tp)
        if shard.shape != parameter.shape:
            raise RunError(
                f"{entry.megatron}: the mapping gives {list(shard.shape)}, megatron-core has {list(parameter.shape)}"
            )
        parameter.copy_(shard)


@torch.no_grad()
def export_hf(module: torch.nn.Module, arch: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, full tensor) in model order on the first rank of the job; nothing on other ranks.

    Collective: every rank must exhaust the iterator. Only the first data-parallel replica works; one full tensor is
    alive at a time, plus whatever the consumer keeps.
    """
    if parallel_state.get_data_parallel_rank() != 0:
        return
    own = _own_entries(module, arch)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stage, is_writer = pipeline.rank(), parallel_state.get_tensor_model_parallel_rank() == 0
    plans = [None] * pipeline.size()
    dist.all_gather_object(plans, [entry.megatron for entry, _ in own], group=pipeline)
    table, sent = {entry.megatron: entry for entry in entries(arch)}, set()
    for source, names in enumerate(plans):
        for position, name in enumerate(names):
            if name in sent:
                continue  # the last stage's copy of a tied embedding
            sent.add(name)
            full = _gather_tensor_parallel(*own[position]) if source == stage else None
            if not is_writer:
                continue
            if source != 0:
                full = _move_to_first_stage(full, source, pipeline)
            if stage == 0:
                yield from zip(table[name].hf, table[name].layout.split(full, arch), strict=True)


def _gather_tensor_parallel(entry: Entry, parameter: torch.nn.Parameter) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or entry.layout.dim is None:
        return parameter.detach()
    shards = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    return entry.layout.unshard(shards)


def _move_to_first_stage(full: torch.Tensor | None, source: int, pipeline: dist.ProcessGroup) -> torch.Tensor | None:
    """The tensor of stage `source` on stage 0: its shape and type, then its data."""
    first, sender = dist.get_global_rank(pipeline, 0), dist.get_global_rank(pipeline, source)
    if pipeline.rank() == source:
        dist.send_object_list([(tuple(full.shape), full.dtype)], dst=first, group=pipeline)
        dist.send(full.contiguous(), dst=first, group=pipeline)
    elif pipeline.rank() == 0:
        header = [None]
        dist.recv_object_list(header, src=sender, group=pipeline)
        shape, dtype = header[0]
        full = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
        dist.recv(full, src=sender, group=pipeline)
    return full
