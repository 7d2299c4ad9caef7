"""Writing megatron-core's torch_dist checkpoints chunk by chunk, in one process and without megatron-core.

The format is torch.distributed.checkpoint's: `.metadata` says which chunk of which tensor lies at which place of
which `.distcp` file, and each chunk is one torch.save archive. megatron-core adds `metadata.json` (the format's
name), one object called `common_state` (older releases: common.pt) and, on demand, `integrity.json` (SHA-256 of
every file). What the tensors mean is megatron_checkpoint.py's affair.
"""

import contextlib
import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

from megatron_egrsd.hf.safetensors_file import raw_bytes

METADATA = ".metadata"
CONFIG = "metadata.json"
INTEGRITY = "integrity.json"
COMMON = "common.pt"
FILE_BYTES = 5 << 30


class TorchDistWriter:
    """Writes chunks of tensors as they come and keeps none. `finish` makes the directory a checkpoint."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.metadata = Metadata(state_dict_metadata={}, storage_data={}, storage_meta=StorageMeta(), version="1.0.0")
        self.hashes: dict[str, str] = {}
        self._file: _HashedFile | None = None
        self._count = 0

    def tensor(self, key: str, chunk: torch.Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Write `chunk` as the part of tensor `key` (global `shape`) that begins at `offsets`."""
        # A view of a mapped file drags its whole storage into torch.save: hand it a storage of the right size.
        chunk = torch.frombuffer(raw_bytes(chunk), dtype=chunk.dtype).view(chunk.shape)
        with _without_crc():
            self._append(MetadataIndex(key, offsets), chunk)
        entry = self.metadata.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(shape), [])
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))

    def object(self, key: str, offsets: tuple[int, ...], shape: tuple[int, ...], value: Any) -> None:
        """Write a picklable object as megatron-core's ShardedObject `key` of that place and global shape."""
        name = f"{key}/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, shape))}"
        self._append(MetadataIndex(name), [value])
        self.metadata.state_dict_metadata[name] = BytesStorageMetadata()

    def finish(self, common: dict[str, Any]) -> None:
        """Write the common state and everything that makes the files a checkpoint."""
        self.object("common_state", (0,), (1,), common)
        self._close()
        for name, content in (
            (COMMON, _saved(common)),
            (METADATA, pickle.dumps(self.metadata)),
            (CONFIG, json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()),
        ):
            (self.directory / name).write_bytes(content)
            self.hashes[name] = hashlib.sha256(content).hexdigest()
        manifest = {"algorithm": "sha256", "files": dict(sorted(self.hashes.items()))}
        (self.directory / INTEGRITY).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def abort(self) -> None:
        """Close what is open; the caller removes the directory."""
        if self._file:
            self._file.close()

    def _append(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.position > FILE_BYTES:
            self._close()
            self._file = _HashedFile(self.directory / f"__0_{self._count}.distcp")
            self._count += 1
        start = self._file.position
        try:
            torch.save(value, self._file)
        except RuntimeError as error:  # torch closes its archive after a failed write, and that fails again
            reason = error
            while reason is not None and not isinstance(reason, OSError | KeyboardInterrupt):
                reason = reason.__context__
            raise reason or error from None
        self.metadata.storage_data[index] = _StorageInfo(self._file.path.name, start, self._file.position - start)

    def _close(self) -> None:
        if self._file:
            self._file.close()
            self.hashes[self._file.path.name] = self._file.digest()
            self._file = None


class _HashedFile(io.RawIOBase):
    """A file opened for writing whose SHA-256 is known when it is closed. The hash runs beside the write."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        self._raw, self._sha, self._thread = open(path, "wb", buffering=0), hashlib.sha256(), ThreadPoolExecutor(1)  # noqa: SIM115

    def write(self, data) -> int:
        hashed = self._thread.submit(self._sha.update, data) if len(data) > 1 << 16 else self._sha.update(data)
        view, written = memoryview(data), 0
        while written < len(view):
            written += self._raw.write(view[written:])
        self.position += written
        if hashed:
            hashed.result()  # `data` is the caller's again when this returns
        return written

    def digest(self) -> str:
        return self._sha.hexdigest()

    def close(self) -> None:
        if not self.closed:
            self._thread.shutdown()
            self._raw.close()
        super().close()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """torch.save without the zip's CRC-32, which costs twice the write; integrity.json's SHA-256 takes its place."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
