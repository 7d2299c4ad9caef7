"""Safetensors files, opened, and written tensor by tensor. Headers come first: every size is known beforehand."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.byte_ranges import Range, raw_bytes, reserve, write_all

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 << 30

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writer of named tensors of one dtype into `directory`, in any order and from any thread; keeps no tensor.

    Shards hold at most `shard_bytes` (a larger tensor has its own) and have the names that transformers gives them.
    Several shards get an index; with a name `single` there is one file of this name. Raises RunError if a tensor does
    not match the announced `shapes` and `dtype`.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype,
                 shard_bytes: int = SHARD_BYTES, single: str = ""):  # fmt: skip
        self.shapes, self.dtype = shapes, dtype
        self._index = directory / INDEX
        self._missing = dict.fromkeys(shapes)
        shards = [list(shapes)] if single else _split(shapes, dtype.itemsize, shard_bytes)
        count = len(shards)
        names = (
            [single or SINGLE]
            if count == 1
            else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        self._places: dict[str, tuple[Path, int]] = {}
        for file, shard in zip(names, shards, strict=True):
            self._write_header(directory / file, shard)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        if name in self.shapes and (tuple(tensor.shape), tensor.dtype) != (self.shapes[name], self.dtype):
            raise RunError(
                f"the export should write {name} as {self.dtype} {list(self.shapes[name])}, but was given "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        self.write_pieces(name, [raw_bytes(tensor)])

    def write_pieces(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Write one tensor from `pieces` of its bytes."""
        if name not in self._missing:
            raise RunError(f"the export should write {next(iter(self._missing), None)} now, but was given {name}")
        path, offset = self._places[name]
        missing = math.prod(self.shapes[name]) * self.dtype.itemsize
        with open(path, "r+b", buffering=0) as file:
            file.seek(offset)
            for piece in pieces:
                write_all(file, piece)
                missing -= len(piece)
        if missing:
            raise RunError(f"the export was given {missing} bytes too few of {name}")
        del self._missing[name]

    def finish(self) -> None:
        """Write the index if there are several shards. Raises RunError if tensors are missing."""
        for name in self._missing:
            raise RunError(f"the export ended before {name}")
        files = {name: path.name for name, (path, _) in self._places.items()}
        if len(set(files.values())) > 1:
            total = sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": files}
            self._index.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_header(self, path: Path, shard: list[str]) -> None:
        """Write the header of a shard and record the offsets of its tensors."""
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in shard:
            start, end = end, end + math.prod(self.shapes[name]) * self.dtype.itemsize
            header[name] = {
                "dtype": _NAMES[self.dtype],
                "shape": list(self.shapes[name]),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
        with open(path, "wb", buffering=0) as file:
            reserve(file, 8 + len(encoded) + end)
            write_all(file, struct.pack("<Q", len(encoded)) + encoded)
        for name in shard:
            self._places[name] = path, 8 + len(encoded) + header[name]["data_offsets"][0]


def write_tensors(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, tuple[int, ...]],
                  *, shard_bytes: int = SHARD_BYTES, single: str = "") -> torch.dtype:  # fmt: skip
    """Write `tensors`, one in memory at a time, and return their dtype. Raises RunError as SafetensorsWriter does."""
    writer = None
    for name, tensor in tensors:
        writer = writer or SafetensorsWriter(directory, shapes, tensor.dtype, shard_bytes, single)
        writer.write(name, tensor.cpu())
    if writer is None:
        raise RunError("there are no weights to export")
    writer.finish()
    return writer.dtype


def open_safetensors(file: Path):
    """Return the file as safe_open's view. Raises BadArgument if it cannot be read."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, struct.error) as error:
        raise BadArgument(f"{file} cannot be read ({error}); it is truncated or not safetensors") from None


def data_ranges(file: Path) -> dict[str, Range]:
    """Return {tensor name: byte range} of a safetensors file that safe_open has accepted."""
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    ends = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: Range(file, 8 + length + start, end - start) for name, (start, end) in ends.items()}


def _split(shapes: Mapping[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
