"""Merging of an adapter into the model that it was trained on, Hugging Face directory to Hugging Face directory.

The constructor checks both inputs completely, `describe` returns the plan and `run` merges, one tensor at a time. A
weight without an adapter keeps its bytes. The output is staged, so it is complete or absent.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_egrsd.hf.adapter_file import AdapterFile
from megatron_egrsd.hf.adapters import adapted_weights, merged
from megatron_egrsd.hf.byte_ranges import Advance, in_threads, pieces
from megatron_egrsd.hf.checkpoint import HFCheckpoint, copy_assets, stored_shapes
from megatron_egrsd.hf.convert import weight_bytes
from megatron_egrsd.hf.safetensors_file import SHARD_BYTES, SafetensorsWriter
from megatron_egrsd.hf.staging import check_target, free_bytes, staged


class Merge:
    """Merge of the directory `adapter` into its model `base`, written to `target` in the base's dtype or in `dtype`."""

    def __init__(self, base: str | Path, adapter: str | Path, target: str | Path, dtype: torch.dtype | None = None,
                 shard_bytes: int = SHARD_BYTES):  # fmt: skip
        self.base, self.target, self.shard_bytes = Path(base), Path(target), shard_bytes
        check_target(self.target, self.base)
        self.checkpoint = HFCheckpoint(base)
        self.adapter = AdapterFile(adapter, self.checkpoint.architecture)
        self.source_dtype = self.checkpoint.dtype()
        self.dtype = dtype or self.source_dtype
        self.checkpoint.check_tied_head()
        self.shapes = stored_shapes(self.checkpoint.architecture, self.checkpoint.stores_tied_head)
        self.nbytes = weight_bytes(self.shapes, self.dtype)

    def describe(self) -> str:
        """Return the plan as text."""
        spec, free = self.adapter.spec, free_bytes(self.target)
        adapted = len(adapted_weights(self.checkpoint.architecture, spec))
        return (
            f"from    {self.base}\n"
            f"adapter {self.adapter.path}: r {spec.rank}, alpha {spec.alpha:g}, {', '.join(spec.targets)}\n"
            f"to      {self.target}: {adapted} of {len(self.checkpoint.names())} tensors change\n"
            f"disk    {self.nbytes / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free"
        )

    def run(self, advance: Advance = lambda nbytes: None) -> None:
        """Merge. Raises RunError if the disk is full, and leaves nothing at `target` then."""
        checkpoint, spec = self.checkpoint, self.adapter.spec
        adapted = adapted_weights(checkpoint.architecture, spec)
        with staged(self.target, self.nbytes) as directory:
            copy_assets(self.base, directory, self.dtype)
            writer = SafetensorsWriter(directory, self.shapes, self.dtype, self.shard_bytes)

            def write(name: str) -> Iterator[int]:
                if name in adapted:
                    a, b = (self.adapter[part] for part in adapted[name])
                    writer.write(name, merged(checkpoint[name], a, b, spec.scale, self.dtype))
                else:
                    writer.write_pieces(name, pieces([checkpoint.range(name)], self.source_dtype, self.dtype))
                yield math.prod(self.shapes[name]) * self.dtype.itemsize

            in_threads(map(write, self.shapes), advance)
            writer.finish()
