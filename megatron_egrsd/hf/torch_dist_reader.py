"""Reading megatron-core's torch_dist checkpoints lazily, whichever layout wrote them, without megatron-core.

torch_dist_writer.py describes the format.
"""

import io
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron_egrsd.errors import RunError
from megatron_egrsd.hf.safe_pickle import MetadataUnpickler, load_without_code
from megatron_egrsd.hf.staging import sha256_of
from megatron_egrsd.hf.torch_dist_writer import COMMON, CONFIG, INTEGRITY, METADATA


class TorchDistReader:
    """Lazy view of a torch_dist directory. RunError, naming file or tensor, where it is damaged.

    `tensors`: key -> TensorStorageMetadata; `objects`: names of the objects.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
            with open(directory / METADATA, "rb") as file:
                metadata = MetadataUnpickler(file).load()
            found = metadata.state_dict_metadata.items()
            self.tensors = {k: v for k, v in found if isinstance(v, TensorStorageMetadata)}
            self.objects = [k for k, v in found if isinstance(v, BytesStorageMetadata)]
            self._storage = {(i.fqn, i.offset and tuple(i.offset)): info for i, info in metadata.storage_data.items()}
        except OSError as error:
            raise RunError(
                f"{error.filename} cannot be read ({error.strerror}), so {directory} is incomplete"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise RunError(f"{directory / METADATA} is damaged ({type(error).__name__}: {error})") from None
        if config.get("sharded_backend") != "torch_dist":
            raise RunError(f"{directory} has the format {config.get('sharded_backend')}; only torch_dist is supported")

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def read(self, key: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """The tensor at `index` of the leading dimensions of `key`, put together from its chunks.

        Reads the chunks that touch it, one at a time. RunError where they do not cover it exactly once.
        """
        lead, shape = len(index), self.shape(key)
        full, covered = None, 0
        for chunk in self.tensors[key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if any(not start <= i < start + n for i, start, n in zip(index, offsets, sizes, strict=False)):
                continue
            part = self._load(key, offsets, sizes)[tuple(i - start for i, start in zip(index, offsets, strict=False))]
            if part.shape == shape[lead:]:
                full, covered = part, covered + part.numel()  # one chunk holds it all: no copy
                continue
            if full is None:
                full = torch.empty(shape[lead:], dtype=self.dtype(key))
            place = tuple(slice(o, o + n) for o, n in zip(offsets[lead:], sizes[lead:], strict=True))
            full[place] = part
            covered += part.numel()
        if covered != math.prod(shape[lead:]):
            raise RunError(f"the chunks of {key}{list(index)} in {self.directory} hold {covered} elements of "
                           f"{math.prod(shape[lead:])}: some are missing or doubled")  # fmt: skip
        return full

    def common(self) -> dict[str, Any]:
        """The common state: iteration, arguments, content metadata. Unknown classes come as empty stand-ins."""
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
        """RunError where the chunks of `key` leave its bounds, overlap or leave a gap."""
        shape = self.shape(key)
        boxes = [(tuple(c.offsets), tuple(c.sizes)) for c in self.tensors[key].chunks]
        for offsets, sizes in boxes:
            if len(offsets) != len(shape) or any(o + n > s for o, n, s in zip(offsets, sizes, shape, strict=True)):
                raise RunError(f"{key} has a chunk at {list(offsets)} of {list(sizes)} outside its shape {list(shape)}")
        # Chunks of different places in the leading dimension cannot overlap; comparing within it keeps this short.
        by_lead: dict[int, list] = {}
        for box in boxes:
            for lead in range(box[0][0], box[0][0] + box[1][0]) if len(shape) > 2 else [0]:
                by_lead.setdefault(lead, []).append(box)
        for group in by_lead.values():
            for n, first in enumerate(group):
                for second in group[n + 1 :]:
                    if _overlap(first, second):
                        raise RunError(f"{key} is duplicated: two chunks hold the elements at {list(second[0])}")
        if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
            raise RunError(f"{key} lacks chunks: its shape {list(shape)} is not covered")

    def damaged_files(self) -> list[str]:
        """Names of files that are missing or differ from integrity.json; empty where there is no such manifest."""
        file = self.directory / INTEGRITY
        if not file.is_file():
            return []
        try:
            expected = json.loads(file.read_text(encoding="utf-8"))["files"]
            return [name for name, digest in expected.items() if sha256_of(self.directory / name) != digest]
        except (ValueError, KeyError, AttributeError, TypeError):
            return [INTEGRITY]

    def _load(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        info = self._storage.get((key, offsets))
        if info is None:
            raise RunError(f"{self.directory / METADATA} does not say where the chunk of {key} at {list(offsets)} lies")
        path = self.directory / info.relative_path
        try:
            with open(path, "rb", buffering=0) as file:
                tensor = torch.load(_Window(file, info.offset, info.length), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RunError(f"{path} is missing; it holds {key}") from None
        except Exception as error:  # torch.load raises a zoo of types on damaged bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"{key} in {path} cannot be read ({reason}); the file is truncated or damaged") from None
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != sizes or tensor.dtype != self.dtype(key):
            raise RunError(f"the chunk of {key} at {list(offsets)} in {path} is not the {list(sizes)} tensor announced")
        return tensor


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int):
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


def _overlap(first: tuple, second: tuple) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*first, *second, strict=True))
