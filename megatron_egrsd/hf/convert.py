"""Conversion of weights between Hugging Face and Megatron-LM directories, tensor by tensor, in one process.

The constructor of a conversion checks its input completely; `describe` returns the plan; `run` converts. Memory holds
byte ranges, not tensors. The output is staged, so it is complete or absent.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron_egrsd.errors import RunError
from megatron_egrsd.hf.byte_ranges import Advance, in_threads, pieces
from megatron_egrsd.hf.checkpoint import EMBEDDING, HEAD, HFCheckpoint, copy_assets, stored_shapes
from megatron_egrsd.hf.mapping import Entry, entries, hf_shapes
from megatron_egrsd.hf.megatron_checkpoint import (
    RELEASE,
    SIDECAR,
    TRACKER,
    MegatronCheckpoint,
    common_state,
    extra_states,
    megatron_shape,
    places,
)
from megatron_egrsd.hf.safetensors_file import SHARD_BYTES, SafetensorsWriter
from megatron_egrsd.hf.staging import check_target, free_bytes, staged
from megatron_egrsd.hf.torch_dist_writer import Object, Part, write_torch_dist
from megatron_egrsd.system.files import read_json_object

RECORD = "conversion.json"


class ToMegatron:
    """Conversion of the Hugging Face `source` to the Megatron-LM `target`, in the source's dtype or in `dtype`."""

    def __init__(self, source: str | Path, target: str | Path, dtype: torch.dtype | None = None):
        self.source, self.target = Path(source), Path(target)
        check_target(self.target, self.source)
        self.checkpoint = HFCheckpoint(source)
        self.architecture = self.checkpoint.architecture
        self.source_dtype = self.checkpoint.dtype()
        self.dtype = dtype or self.source_dtype
        self.checkpoint.check_tied_head()
        self.common = common_state(self.architecture, self.dtype)
        self.nbytes = weight_bytes(hf_shapes(self.architecture), self.dtype)

    def describe(self) -> str:
        """Return the plan as text."""
        return _plan(self, f"torch_dist in {RELEASE}/, config and tokenizer in {SIDECAR}/")

    def run(self, advance: Advance = lambda nbytes: None) -> None:
        """Convert. Raises RunError if the disk is full, and leaves nothing at `target` then."""
        arch, checkpoint = self.architecture, self.checkpoint
        shapes, parts = hf_shapes(arch), []
        for entry in entries(arch):
            place, shape = places(entry, arch)[0], megatron_shape(entry, arch, shapes)
            offsets, sizes = (*place.index, *(0 for _ in shape)), (*(1 for _ in place.lead), *shape)
            parts.append(Part(place.key, offsets, sizes, (*place.lead, *shape), checkpoint.ranges(entry, shapes)))
        with staged(self.target, self.nbytes) as directory:
            (directory / RELEASE).mkdir()
            objects = [Object(*place, None) for place in extra_states(arch)]
            write_torch_dist(directory / RELEASE, parts, objects, self.common, self.source_dtype, self.dtype, advance)
            copy_assets(self.source, directory / SIDECAR, self.dtype)
            record = record_of(checkpoint, self.dtype)
            (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (directory / TRACKER).write_text(RELEASE, encoding="utf-8")


class ToHF:
    """Conversion of the Megatron-LM `source` to the Hugging Face `target`, with config and tokenizer of `like`."""

    def __init__(self, source: str | Path, target: str | Path, like: str | Path | None = None,
                 dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES):  # fmt: skip
        self.source, self.target = Path(source), Path(target)
        check_target(self.target, self.source)
        self.checkpoint = MegatronCheckpoint(source, like)
        self.architecture = self.checkpoint.architecture
        raise_problems(self.checkpoint.problems(), self.source)
        self.source_dtype = self.checkpoint.dtype()
        self.dtype = dtype or self.source_dtype
        self.shard_bytes = shard_bytes
        record = self.checkpoint.root / RECORD
        stored = read_json_object(record).get("stores_tied_head") if like is None and record.is_file() else False
        self.stores_tied_head = bool(stored) and self.architecture.tied_embeddings
        self.shapes = stored_shapes(self.architecture, self.stores_tied_head)
        self.nbytes = weight_bytes(self.shapes, self.dtype)

    def describe(self) -> str:
        """Return the plan as text."""
        state = self.checkpoint.training_state()
        note = f"; {len(state)} tensors of training state are left behind" if state else ""
        return _plan(self, f"safetensors in shards of at most {self.shard_bytes / 1e9:.1f} GB{note}")

    def run(self, advance: Advance = lambda nbytes: None) -> None:
        """Convert. Raises RunError if a chunk is damaged or the disk is full, and leaves nothing at `target` then."""
        with staged(self.target, self.nbytes) as directory:
            copy_assets(self.checkpoint.like, directory, self.dtype)
            writer = SafetensorsWriter(directory, self.shapes, self.dtype, self.shard_bytes)

            def copy(entry: Entry) -> Iterator[int]:
                for name, ranges in self.checkpoint.ranges(entry, self.shapes).items():
                    for target in (HEAD, name) if name == EMBEDDING and self.stores_tied_head else (name,):
                        writer.write_pieces(target, pieces(ranges, self.source_dtype, self.dtype))
                        yield math.prod(self.shapes[target]) * self.dtype.itemsize

            in_threads(map(copy, entries(self.architecture)), advance)
            writer.finish()


def record_of(checkpoint: HFCheckpoint, dtype: torch.dtype) -> dict:
    """Return the content of conversion.json: facts about the source of a conversion that config.json does not hold."""
    return {
        "dtype": _name(dtype),
        "source_dtype": _name(checkpoint.dtype()),
        "stores_tied_head": checkpoint.stores_tied_head,
    }


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Return the bytes of weights of these shapes."""
    return sum(map(math.prod, shapes.values())) * dtype.itemsize


def raise_problems(problems: list[str], path: Path) -> None:
    """Raise a RunError that names the first of `problems` and counts the others, if there are any."""
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise RunError(f"{path}: {problems[0]}{more}")


def _plan(conversion: ToMegatron | ToHF, form: str) -> str:
    arch, free = conversion.architecture, free_bytes(conversion.target)
    types = _name(conversion.dtype)
    if conversion.dtype != conversion.source_dtype:
        types = f"{_name(conversion.source_dtype)} -> {types}"
    kind = f"{arch.num_experts} experts" if arch.num_experts else "dense"
    tied = "tied" if arch.tied_embeddings else "untied"
    return (
        f"from    {conversion.source}\n"
        f"to      {conversion.target}: {form}\n"
        f"model   {arch.family.name} {kind}, {arch.num_parameters / 1e9:.2f}B parameters, {arch.num_layers} layers, "
        f"vocabulary {arch.vocab_size} ({tied})\n"
        f"tensors {len(hf_shapes(arch))} in Hugging Face, {len(entries(arch))} in Megatron, {types}\n"
        f"disk    {conversion.nbytes / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
