"""The evaluated model as a Hugging Face directory for SGLang: converted from Megatron, or merged with an adapter."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_egrsd.config import Config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.convert import ToHF
from megatron_egrsd.hf.merge import Merge
from megatron_egrsd.rollout.server_command import check_served_model

_TEMPORARY = ".hf-"  # begins the name of a temporary directory


@contextlib.contextmanager
def hugging_face(config: Config) -> Iterator[str]:
    """Yield the Hugging Face directory of `model.path` with the adapter `lora.init` merged into it, if there is one.

    It is `model.path` itself, or a temporary one in the output: for an adapter, or a Megatron checkpoint. Those that
    killed processes have left are removed first, so the caller holds the output's lock.
    """
    output = Path(config.output)
    for left in output.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)
    path, like = Path(config.model.path), config.evaluation.benchmarks.like or None
    is_megatron = path.is_dir() and not (path / "config.json").is_file()
    if not is_megatron:
        check_served_model(Architecture.from_pretrained(path))
    if not (is_megatron or config.lora.init):
        yield config.model.path
        return
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=output) as directory:
        if is_megatron:
            try:
                conversion = ToHF(path, Path(directory) / "hf", like)
            except BadArgument as error:
                raise BadArgument(f"model.path: {error}".replace("--like", "evaluation.benchmarks.like")) from None
            print(f"converting {path} to a Hugging Face checkpoint for SGLang", flush=True)
            conversion.run()
            path = conversion.target
        if config.lora.init:
            merge = Merge(path, config.lora.init, Path(directory) / "merged")
            print(f"merging {config.lora.init} into {config.model.path} for SGLang", flush=True)
            merge.run()
            path = merge.target
        yield str(path)


def digest(path: Path) -> str:
    """Return a digest of the checkpoint: of the name, the size and both ends of every file."""
    ends = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        with file.open("rb") as content:
            ends.update(f"{file.relative_to(path)} {size}\n".encode() + content.read(1 << 16))
            content.seek(max(0, size - (1 << 16)))
            ends.update(content.read())
    return ends.hexdigest()[:16]
