"""Reader and writer of Hugging Face safetensors checkpoints, one tensor at a time."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.byte_ranges import Range
from megatron_egrsd.hf.mapping import Entry, hf_shapes
from megatron_egrsd.hf.safetensors_file import (
    DTYPES,
    INDEX,
    SHARD_BYTES,
    SINGLE,
    data_ranges,
    open_safetensors,
    write_tensors,
)
from megatron_egrsd.hf.staging import staged

CONFIG = "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_MARKS = (CONFIG, "metrics.jsonl", "metadata.json", "latest_checkpointed_iteration.txt")  # of a directory of its own
_INDICES = (".safetensors.index.json", ".bin.index.json")


class HFCheckpoint:
    """Lazy view of the tensors of a checkpoint directory: a tensor is read when it is accessed.

    The constructor raises BadArgument if a shard is missing or truncated, if a tensor is missing or has another
    shape than config.json implies, or if the checkpoint holds tensors that the model does not have.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.architecture = Architecture.from_pretrained(path)
        self._open = {}
        self._ranges: dict[str, Range] = {}
        self._files = self._locate()
        # Some exports of tied models carry the embedding a second time under the head's name.
        self.stores_tied_head = self.architecture.tied_embeddings and HEAD in self._files
        self._check()

    def _locate(self) -> dict[str, Path]:
        """Return {tensor name: path of the shard that holds it}."""
        index = self.path / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                located = {name: self.path / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadArgument(f"{index} is not a safetensors index") from None
            if outside := [file for file in weight_map.values() if Path(file).name != file]:
                raise BadArgument(f"{index} names {outside[0]!r}; its files must lie beside it")
            for file in set(located.values()):
                for name in self._handle(file).keys():  # noqa: SIM118 (safe_open is no dictionary)
                    if located.get(name) != file:
                        other = located[name].name if name in located else "nowhere"
                        raise BadArgument(f"{file} holds {name}, which {INDEX} places {other}: duplicated or stray")
            return located
        file = self.path / SINGLE
        if not file.is_file():
            raise BadArgument(f"{self.path} holds neither {SINGLE} nor {INDEX}; weights must be safetensors")
        return dict.fromkeys(self._handle(file).keys(), file)

    def _handle(self, file: Path):
        if file not in self._open:
            if not file.is_file():
                raise BadArgument(f"the shard {file} is missing, though the index names it")
            self._open[file] = open_safetensors(file)
        return self._open[file]

    def _check(self) -> None:
        expected = hf_shapes(self.architecture)
        extra = set(self._files) - set(expected) - ({HEAD} if self.stores_tied_head else set())
        missing = set(expected) - set(self._files)
        if missing or extra:
            what = f"lacks {min(missing)}" if missing else f"has the unknown tensor {min(extra)}"
            raise BadArgument(
                f"{self.path} {what} ({len(missing)} missing, {len(extra)} unknown); "
                "its weights and its config.json do not belong together"
            )
        for name, shape in expected.items():
            found = self._slice(name).get_shape()
            if found != list(shape):
                raise BadArgument(f"{name} in {self.path} has shape {found}, but config.json implies {list(shape)}")

    def _slice(self, name: str):
        file = self._files[name]
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError:
            raise BadArgument(f"the index says that {file.name} holds {name}, but it does not") from None

    def dtype(self) -> torch.dtype:
        """Return the dtype of all weights. Raises BadArgument if they differ or are not bf16, fp16 or fp32."""
        found = {self._slice(name).get_dtype(): name for name in self.names()}
        if len(found) > 1 or not set(found) <= set(DTYPES):
            what = " and ".join(f"{dtype} ({name})" for dtype, name in found.items())
            raise BadArgument(f"the weights in {self.path} are {what}; one of {', '.join(DTYPES)} is supported")
        return DTYPES[next(iter(found))]

    def describe(self) -> str:
        """Return the number of tensors and files, and their type."""
        files = len(set(self._files.values()))
        return f"{len(self._files)} tensors of {str(self.dtype()).removeprefix('torch.')} in {files} file(s)"

    def check_tied_head(self) -> None:
        """Raise BadArgument if a tied model stores a head that differs from its embedding."""
        if self.stores_tied_head:
            head, embedding = self[HEAD], self[EMBEDDING]
            if head.shape != embedding.shape or head.dtype != embedding.dtype or not _same_bytes(head, embedding):
                raise BadArgument(f"{HEAD} in {self.path} differs from {EMBEDDING}, though config.json ties them")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._handle(self._files[name]).get_tensor(name)

    def range(self, name: str) -> Range:
        """Return the byte range of a tensor."""
        if name not in self._ranges:
            self._ranges |= data_ranges(self._files[name])
        return self._ranges[name]

    def ranges(self, entry: Entry, shapes: dict[str, tuple[int, ...]]) -> list[Range]:
        """Return the byte ranges of the entry's full megatron tensor, in order; `shapes` is `hf_shapes(...)`."""
        sizes, found = [shapes[name][0] for name in entry.hf], []
        for i, first, end in entry.layout.rows(sizes, self.architecture):
            path, offset, nbytes = self.range(entry.hf[i])
            row = nbytes // sizes[i]
            found.append(Range(path, offset + first * row, (end - first) * row))
        return found

    def names(self) -> list[str]:
        """Return the names of the model's tensors, in mapping order."""
        return list(hf_shapes(self.architecture))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def save_hf(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    like: str | Path,
    path: str | Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face checkpoint: tensors from the iterator, every other file from `like`.

    Holds one tensor in memory at a time. `path` is complete afterwards or does not exist. Raises BadArgument if `path`
    exists already, RunError if a tensor is missing, unexpected or mis-shaped.
    """
    shapes = hf_shapes(Architecture.from_pretrained(like))
    with staged(path) as directory:
        dtype = write_tensors(directory, named_tensors, shapes, shard_bytes=shard_bytes)
        copy_assets(like, directory, dtype)


def stored_shapes(arch: Architecture, tied_head: bool) -> dict[str, tuple[int, ...]]:
    """Return `hf_shapes`, with the embedding under the head's name too if `tied_head`."""
    shapes = hf_shapes(arch)
    return {HEAD: shapes[EMBEDDING], **shapes} if tied_head else shapes


def holds_weights(path: Path) -> bool:
    """Return whether a directory holds any file of weights, or an index of them."""
    return any(file.suffix in _WEIGHTS or file.name.endswith(_INDICES) for file in path.iterdir())


def config_with_dtype(config: Path, dtype: torch.dtype) -> bytes:
    """Return the bytes of a config.json that names the type of the weights: its own if it does already."""
    data, name = config.read_bytes(), str(dtype).removeprefix("torch.")
    content = json.loads(data)
    keys = [key for key in ("torch_dtype", "dtype") if key in content] or ["dtype"]
    if all(content.get(key) == name for key in keys):
        return data
    return (json.dumps(content | dict.fromkeys(keys, name), indent=2) + "\n").encode()


def assets(path: str | Path) -> dict[str, Path]:
    """Return {relative name: path} of a checkpoint's files other than weights: configs, tokenizer, templates, licence.

    Hidden directories (download caches) are left out, and so are other models, checkpoints and runs below it.
    """
    path = Path(path)
    found, others = {}, {mark.parent for name in _MARKS for mark in path.rglob(name)} - {path}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts) or not others.isdisjoint(file.parents)
        if file.is_file() and not hidden and file.suffix not in _WEIGHTS and not file.name.endswith(_INDICES):
            found[relative.as_posix()] = file
    return found


def copy_assets(source: str | Path, target: Path, dtype: torch.dtype) -> None:
    """Copy `assets(source)` into `target`, byte for byte, but that config.json names the weights' type.

    transformers rounds them to the type that it names.
    """
    for name, file in assets(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
    (target / CONFIG).write_bytes(config_with_dtype(target / CONFIG, dtype))
