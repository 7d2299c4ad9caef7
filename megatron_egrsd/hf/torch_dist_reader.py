"""Lazy reader of megatron-core's torch_dist checkpoints of any parallel layout, without megatron-core.

torch_dist_writer.py describes the format.
"""

import io
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_egrsd.errors import RunError
from megatron_egrsd.hf import integrity
from megatron_egrsd.hf.byte_ranges import Range
from megatron_egrsd.hf.safe_pickle import load_metadata, load_without_code
from megatron_egrsd.hf.torch_dist_writer import COMMON, CONFIG, METADATA


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the torch.save archive that holds it: `length` bytes at `start` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint: its global shape, its dtype, and the chunks that cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class TorchDistReader:
    """Lazy view of a torch_dist directory; `tensors` maps each key to its StoredTensor.

    Raises RunError, which names the file or the tensor, if the checkpoint is damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._data_offsets: dict[Chunk, int] = {}
        self._chunks_by_index: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
        try:
            config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
            metadata = load_metadata((directory / METADATA).read_bytes())
            self._storage = {(i.fqn, i.offset and tuple(i.offset)): info for i, info in metadata.storage_data.items()}
            self.tensors = {
                key: self._stored_tensor(key, value)
                for key, value in metadata.state_dict_metadata.items()
                if isinstance(value, TensorStorageMetadata)
            }
            backend = config["sharded_backend"]
        except OSError as error:
            raise RunError(
                f"{error.filename} cannot be read ({error.strerror}), so {directory} is incomplete"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise RunError(f"{directory / METADATA} is damaged ({type(error).__name__}: {error})") from None
        if backend != "torch_dist":
            raise RunError(f"{directory} has the format {backend}; only torch_dist is supported")

    def _stored_tensor(self, key: str, value: TensorStorageMetadata) -> StoredTensor:
        """Return the record in plain types. Any exception means a damaged file."""
        chunks = []
        for chunk in value.chunks:
            offsets = tuple(map(int, chunk.offsets))
            info = self._storage[(key, offsets)]
            place = str(info.relative_path), int(info.offset), int(info.length)
            chunks.append(Chunk(offsets, tuple(map(int, chunk.sizes)), *place))
        if not isinstance(value.properties.dtype, torch.dtype):
            raise TypeError(f"{key} has no type")
        return StoredTensor(tuple(map(int, value.size)), value.properties.dtype, tuple(chunks))

    def ranges(self, key: str, index: tuple[int, ...], first: int, end: int) -> list[Range]:
        """Return the byte ranges of rows [`first`, `end`) of the tensor `key`[`index`], in order.

        Rows may be split along their columns. Raises RunError if the chunks do not cover the rows exactly once.
        """
        stored, lead = self.tensors[key], len(index)
        columns, itemsize = math.prod(stored.shape[lead + 1 :]), stored.dtype.itemsize
        found, row = [], first
        while row < end:  # from one set of chunks to the next
            here = [c for c in self._chunks_at(key, index) if c.offsets[lead] <= row < c.offsets[lead] + c.sizes[lead]]
            chunks = sorted(here, key=lambda chunk: chunk.offsets[lead + 1 :])
            widths = [math.prod(chunk.sizes[lead + 1 :]) for chunk in chunks]
            if sum(widths) != columns:
                raise RunError(
                    f"the chunks of {key}{list(index)} in {self.directory} hold {sum(widths)} of the {columns} "
                    f"elements of row {row}: some are missing or doubled"
                )
            until = min([end, *(chunk.offsets[lead] + chunk.sizes[lead] for chunk in chunks)])
            places = [
                (self.directory / chunk.file, self._offset(key, chunk, (*index, row)), width * itemsize)
                for chunk, width in zip(chunks, widths, strict=True)
            ]
            rows = until - row
            if len(places) == 1:
                path, offset, nbytes = places[0]
                found.append(Range(path, offset, rows * nbytes))
            else:
                found += [Range(path, offset + i * size, size) for i in range(rows) for path, offset, size in places]
            row = until
        return found

    def _chunks_at(self, key: str, index: tuple[int, ...]) -> list[Chunk]:
        """Return the chunks that hold a part of the tensor at `index`. The first call for `key` sorts all chunks."""
        if key not in self._chunks_by_index:
            boxes: dict[tuple[int, ...], list[Chunk]] = {}
            for chunk in self.tensors[key].chunks:
                spans = [range(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
                for inside in itertools.product(*spans[: len(index)]):
                    boxes.setdefault(inside, []).append(chunk)
            self._chunks_by_index[key] = boxes  # assigned complete: other threads may read it
        return self._chunks_by_index[key].get(index, [])

    def _offset(self, key: str, chunk: Chunk, row: tuple[int, ...]) -> int:
        """Return the file offset of the part of `row` (an index without the column) that `chunk` holds."""
        elements = 0
        for i, start, size in zip(row, chunk.offsets, chunk.sizes, strict=False):
            elements = elements * size + i - start
        elements *= math.prod(chunk.sizes[len(row) :])
        if chunk not in self._data_offsets:
            self._data_offsets[chunk] = self._data_offset(key, chunk)
        return self._data_offsets[chunk] + elements * self.tensors[key].dtype.itemsize

    def common(self) -> dict[str, Any]:
        """Return the common state: iteration, arguments, content metadata. Unknown classes become empty stand-ins."""
        try:
            if (self.directory / COMMON).is_file():
                return load_without_code((self.directory / COMMON).read_bytes())
            info = self._storage[("common_state/shard_0_1", None)]
            with open(self.directory / info.relative_path, "rb") as file:
                file.seek(info.offset)
                return load_without_code(file.read(info.length))[0]
        except Exception as error:
            raise RunError(f"the common state of {self.directory} cannot be read ({error})") from None

    def check_tiling(self, key: str) -> None:
        """Raise RunError if the chunks of `key` leave its bounds, overlap or leave a gap."""
        shape, chunks = self.tensors[key].shape, self.tensors[key].chunks
        for chunk in chunks:
            boxes = zip(chunk.offsets, chunk.sizes, shape, strict=False)
            if len(chunk.offsets) != len(shape) or any(start + size > end for start, size, end in boxes):
                raise RunError(f"{key} has a chunk at {list(chunk.offsets)} outside its shape {list(shape)}")
        active: list[Chunk] = []  # chunks that reach into the layer (or row) where the next chunk begins
        for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
            active = [other for other in active if other.offsets[0] + other.sizes[0] > chunk.offsets[0]]
            if any(_overlap(chunk, other) for other in active):
                raise RunError(f"{key} is duplicated: two chunks hold the elements at {list(chunk.offsets)}")
            active.append(chunk)
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise RunError(f"{key} lacks chunks: its shape {list(shape)} is not covered")

    def damaged_files(self) -> list[str]:
        """Return the names of files that do not match integrity.json; none if there is no such manifest."""
        if not (self.directory / integrity.INTEGRITY).is_file():
            return []
        try:
            return sorted(integrity.differing(self.directory))
        except ValueError:
            return [integrity.INTEGRITY]

    def _data_offset(self, key: str, chunk: Chunk) -> int:
        """Return the file offset of a chunk's elements. Raises RunError if its archive is not the tensor announced."""
        path, announced = self.directory / chunk.file, (chunk.sizes, self.tensors[key].dtype)
        try:
            with open(path, "rb", buffering=0) as file:
                window = _Window(file, chunk.start, chunk.length)
                tensor = torch.load(window, map_location="meta", weights_only=True)  # reads no elements
            found = tuple(tensor.shape), tensor.dtype
            begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
        except FileNotFoundError:
            raise RunError(f"{path} is missing; it holds {key}") from None
        except Exception as error:  # torch.load raises many types on damaged bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"{key} in {path} cannot be read ({reason}); the file is truncated or damaged") from None
        if found != announced or not tensor.is_contiguous() or begin + tensor.nbytes > chunk.length:
            raise RunError(f"the chunk of {key} at {list(chunk.offsets)} in {path} is not the tensor announced")
        return chunk.start + begin


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of an open file as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count


def _overlap(a: Chunk, b: Chunk) -> bool:
    boxes = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(x < y + m and y < x + n for x, n, y, m in boxes)
