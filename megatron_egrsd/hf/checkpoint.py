"""Reading and writing Hugging Face safetensors checkpoints, one tensor at a time."""

import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFCheckpoint:
    """Lazy view of the tensors of a checkpoint directory; a tensor is read when it is asked for.

    Raises BadArgument at construction where a shard is missing or truncated, a tensor is missing or has another
    shape than config.json implies, or the checkpoint holds tensors that Qwen3 does not have.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.architecture = Architecture.from_pretrained(path)
        self._open = {}
        self._files = self._locate()
        self._check()

    def _locate(self) -> dict[str, Path]:
        """Tensor name -> the shard that holds it."""
        index = self.path / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError):
                raise BadArgument(f"{index} is not a safetensors index") from None
            return {name: self.path / file for name, file in weight_map.items()}
        file = self.path / SINGLE
        if not file.is_file():
            raise BadArgument(f"{self.path} holds neither {SINGLE} nor {INDEX}; weights must be safetensors")
        return dict.fromkeys(self._handle(file).keys(), file)

    def _handle(self, file: Path):
        if file not in self._open:
            if not file.is_file():
                raise BadArgument(f"the shard {file} is missing, though the index names it")
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError, struct.error) as error:
                raise BadArgument(f"{file} cannot be read ({error}); it is truncated or not safetensors") from None
        return self._open[file]

    def _check(self) -> None:
        expected = hf_shapes(self.architecture)
        # Some exports of tied models carry the embedding a second time under the head's name.
        extra = set(self._files) - set(expected) - ({"lm_head.weight"} if self.architecture.tied_embeddings else set())
        missing = set(expected) - set(self._files)
        if missing or extra:
            what = f"lacks {min(missing)}" if missing else f"has the unknown tensor {min(extra)}"
            raise BadArgument(
                f"{self.path} {what} ({len(missing)} missing, {len(extra)} unknown); "
                "its weights and its config.json do not belong together"
            )
        for name, shape in expected.items():
            found = self._shape(name)
            if found != shape:
                raise BadArgument(
                    f"{name} in {self.path} has shape {list(found)}, but config.json implies {list(shape)}"
                )

    def _shape(self, name: str) -> tuple[int, ...]:
        file = self._files[name]
        try:
            return tuple(self._handle(file).get_slice(name).get_shape())
        except SafetensorError:
            raise BadArgument(f"the index says that {file.name} holds {name}, but it does not") from None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._handle(self._files[name]).get_tensor(name)

    def names(self) -> list[str]:
        """The names of the tensors that Qwen3 has, in mapping order."""
        return list(hf_shapes(self.architecture))


def save_hf(
    named_tensors: Iterable[tuple[str, torch.Tensor]], like: str | Path, path: str | Path, shard_bytes: int = 5 << 30
) -> None:
    """Write a Hugging Face checkpoint: tensors from the iterator, everything else copied from `like`.

    Shards are written as they fill, into a temporary directory beside `path` that is renamed at the end, so `path`
    either does not exist or is complete. BadArgument where `path` exists already.
    """
    path, like = Path(path), Path(like)
    if path.exists():
        raise BadArgument(f"{path} exists already; choose another directory or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in like.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copy2(file, temporary / file.name)

    shard, size, shards = {}, 0, []
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(shard, temporary, len(shards)))
            shard, size = {}, 0
        # A copy also where it is contiguous already: the source may reuse its buffer for the next tensor.
        shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += tensor.nbytes
    shards.append(_write_shard(shard, temporary, len(shards)))

    if len(shards) == 1:
        shards[0][0].rename(temporary / SINGLE)
    else:
        weight_map, total = {}, 0
        for i, (file, names, nbytes) in enumerate(shards):
            final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            file.rename(temporary / final)
            weight_map |= dict.fromkeys(names, final)
            total += nbytes
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    temporary.rename(path)


def _write_shard(shard: dict[str, torch.Tensor], directory: Path, number: int) -> tuple[Path, list[str], int]:
    file = directory / f"shard-{number}.safetensors"
    save_file(shard, file, metadata={"format": "pt"})
    return file, list(shard), sum(t.nbytes for t in shard.values())
