"""Writing a safetensors checkpoint tensor by tensor: the header first, since every size is known beforehand."""

import json
import math
import struct
from pathlib import Path

import torch

from megatron_egrsd.errors import RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 << 30

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as they lie in memory; copies only what is not contiguous."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


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
        expected, shard = next(self._order, (None, None))
        if (name, tuple(tensor.shape), tensor.dtype) != (expected, self.shapes.get(name), self.dtype):
            raise RunError(
                f"the export should write {expected} as {self.dtype} {list(self.shapes.get(expected, ()))} now, but "
                f"was given {name} as {tensor.dtype} {list(tensor.shape)}"
            )
        if shard != self._shard:
            self._next_file(shard)
        self._file.write(raw_bytes(tensor))

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
        # Unbuffered: every write is a whole tensor.
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
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)


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
