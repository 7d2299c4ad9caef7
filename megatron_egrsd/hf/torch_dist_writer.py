"""Writer of megatron-core's torch_dist checkpoints from byte ranges of files, without megatron-core.

The format is torch.distributed.checkpoint's: `.metadata` maps each chunk of each tensor to its place in a `.distcp`
file, and each chunk is one torch.save archive. megatron-core adds `metadata.json` (the format's name), one object
called `common_state` (older releases: common.pt) and, on demand, `integrity.json` (SHA-256 of every file).
"""

import functools
import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_egrsd.hf import integrity
from megatron_egrsd.hf.byte_ranges import Advance, Range, in_threads, pieces, reserve, write_all

METADATA = ".metadata"
CONFIG = "metadata.json"
COMMON = "common.pt"
FILE_BYTES = 5 << 30
MIN_FILES = 8


class Part(NamedTuple):
    """A box of the tensor `key` of global `shape`; `ranges` locate its elements in the source, in order."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    ranges: list[Range]


class Object(NamedTuple):
    """A picklable value, stored as megatron-core's ShardedObject `key` with these offsets and global shape."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    value: Any


def write_torch_dist(directory: Path, parts: list[Part], objects: list[Object], common: dict[str, Any],
                     stored: torch.dtype, wanted: torch.dtype, advance: Advance) -> None:  # fmt: skip
    """Write a checkpoint of `parts` into `directory`, rounded from dtype `stored` to `wanted`.

    Even a small model has several files: hashing takes longer than writing, and each file is hashed in its own thread.
    The number of files does not depend on the machine.
    """
    groups = _divided(parts, wanted)
    files = [_HashedFile(directory / f"__0_{i}.distcp", wanted) for i in range(len(groups))]
    try:
        in_threads((f.tensors(group, stored) for f, group in zip(files, groups, strict=True)), advance)
        for value in (*objects, Object("common_state", (0,), (1,), common)):
            files[-1].object(value)
    finally:
        for file in files:
            file.close()
    hashes = {file.path.name: file.sha.hexdigest() for file in files}
    for name, content in (
        (COMMON, _saved(common)),
        (METADATA, pickle.dumps(_metadata(parts, files, wanted))),
        (CONFIG, json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()),
    ):
        (directory / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    integrity.write(directory, hashes)


class _HashedFile:
    """A `.distcp` file that is being written: its hash, and the places of its chunks and objects."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.path, self.dtype, self.sha, self.places = path, dtype, hashlib.sha256(), {}
        self._raw, self._position = open(path, "wb", buffering=0), 0  # noqa: SIM115

    def tensors(self, parts: list[Part], stored: torch.dtype) -> Iterator[int]:
        """Write `parts`, yielding the bytes of each."""
        reserve(self._raw, sum(math.prod(part.sizes) for part in parts) * self.dtype.itemsize)
        for part in parts:
            start = self._position
            before, behind = _archive(part.sizes, self.dtype)
            self._write(before)
            for piece in pieces(part.ranges, stored, self.dtype):
                self._write(piece)
            self._write(behind)
            self._place(MetadataIndex(part.key, part.offsets), start)
            yield math.prod(part.sizes) * self.dtype.itemsize

    def object(self, value: Object) -> None:
        start = self._position
        self._write(_saved([value.value]))
        name = f"{value.key}/shard_{'.'.join(map(str, value.offsets))}_{'.'.join(map(str, value.shape))}"
        self._place(MetadataIndex(name), start)

    def close(self) -> None:
        self._raw.close()

    def _write(self, data: bytes | memoryview) -> None:
        self.sha.update(data)
        write_all(self._raw, data)
        self._position += len(data)

    def _place(self, index: MetadataIndex, start: int) -> None:
        self.places[index] = _StorageInfo(self.path.name, start, self._position - start)


def _metadata(parts: list[Part], files: list[_HashedFile], dtype: torch.dtype) -> Metadata:
    places = {index: place for file in files for index, place in file.places.items()}
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, offsets, sizes, shape, _ in parts:
        entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), []))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    entries |= {index.fqn: BytesStorageMetadata() for index in places if index.offset is None}
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")


def _divided(parts: list[Part], dtype: torch.dtype) -> list[list[Part]]:
    """Divide `parts` into runs of about equal size, one for each file."""
    total, done = sum(math.prod(part.sizes) for part in parts), 0
    count = max(MIN_FILES, math.ceil(total * dtype.itemsize / FILE_BYTES))
    runs = [[] for _ in range(count)]
    for part in parts:
        runs[done * count // total].append(part)
        done += math.prod(part.sizes)
    return [run for run in runs if run]


@functools.lru_cache(256)
def _archive(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return the bytes that torch.save writes before and behind a tensor's elements. Their CRC is wrong, and unread."""
    sink = _Sink()
    with torch.serialization.skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), sink)
    before, behind = map(bytes, sink.halves)
    return before, behind


class _Sink(io.RawIOBase):
    """File object for torch.save that starts a new half when torch.save seeks over the elements."""

    def __init__(self):
        self.halves = [bytearray()]

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.halves.append(bytearray())
        return 0

    def write(self, data) -> int:
        self.halves[-1].extend(data)
        return len(data)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
