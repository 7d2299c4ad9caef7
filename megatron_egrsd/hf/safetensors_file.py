"""Writing a safetensors checkpoint tensor by tensor: the header first, since every size is known beforehand."""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_egrsd.errors import RunError
from megatron_egrsd.hf.byte_ranges import Range, raw_bytes, write_all

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 << 30

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes named tensors of one dtype into `directory`, in the order of `shapes`, without keeping any.

    Shards hold at most `shard_bytes` (a larger tensor has its own) and are named as transformers names them, with an
    index where there are several. RunError where the tensors that come are not those announced.
    """

    def __init__(self, directory: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype,
                 shard_bytes: int = SHARD_BYTES):  # fmt: skip
        self.directory, self.shapes, self.dtype = directory, shapes, dtype
        self.shards = _split(shapes, dtype.itemsize, shard_bytes)
        count = len(self.shards)
        self.files = (
            [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        self._order = iter([(name, i) for i, shard in enumerate(self.shards) for name in shard])
        self._shard, self._file = -1, None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor."""
        if name in self.shapes and (tuple(tensor.shape), tensor.dtype) != (self.shapes[name], self.dtype):
            raise RunError(
                f"the export should write {name} as {self.dtype} {list(self.shapes[name])}, but was given "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        self.write_pieces(name, [raw_bytes(tensor)])

    def write_pieces(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Append the next tensor, given as its bytes in pieces."""
        expected, shard = next(self._order, (None, None))
        if name != expected:
            raise RunError(f"the export should write {expected} now, but was given {name}")
        if shard != self._shard:
            self._next_file(shard)
        missing = math.prod(self.shapes[name]) * self.dtype.itemsize
        for piece in pieces:
            write_all(self._file, piece)
            missing -= len(piece)
        if missing:
            raise RunError(f"the export was given {missing} bytes too few of {name}")

    def finish(self) -> None:
        """Close the last shard and write the index. RunError where tensors are missing."""
        missing = next(self._order, None)
        if missing:
            raise RunError(f"the export ended before {missing[0]}")
        self._file.close()
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize},
                "weight_map": {
                    name: file for file, names in zip(self.files, self.shards, strict=True) for name in names
                },
            }
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abort(self) -> None:
        """Close what is open; the caller removes the directory."""
        if self._file:
            self._file.close()

    def _next_file(self, shard: int) -> None:
        self.abort()
        self._shard = shard
        self._file = open(self.directory / self.files[shard], "wb", buffering=0)  # noqa: SIM115
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in self.shards[shard]:
            start, end = end, end + math.prod(self.shapes[name]) * self.dtype.itemsize
            header[name] = {
                "dtype": _NAMES[self.dtype],
                "shape": list(self.shapes[name]),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
        write_all(self._file, struct.pack("<Q", len(encoded)) + encoded)


def data_ranges(file: Path) -> dict[str, Range]:
    """Tensor name -> where its bytes lie, of a safetensors file that safe_open has accepted."""
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    ends = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: Range(file, 8 + length + start, end - start) for name, (start, end) in ends.items()}


def _split(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards
