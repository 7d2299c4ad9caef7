"""The evaluated checkpoint: a Hugging Face directory, or a Megatron directory that is converted for SGLang."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_egrsd.config import Config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.convert import ToHF


@contextlib.contextmanager
def hugging_face(config: Config) -> Iterator[str]:
    """Yield the Hugging Face directory of `model.path`: itself, or a temporary conversion of a Megatron checkpoint."""
    path, like = Path(config.model.path), config.evaluation.benchmarks.like or None
    if (path / "config.json").is_file() or not path.is_dir():
        yield config.model.path
        return
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hf-", dir=output) as directory:
        try:
            conversion = ToHF(path, Path(directory) / "hf", like)
        except BadArgument as error:
            raise BadArgument(f"model.path: {error}".replace("--like", "evaluation.benchmarks.like")) from None
        print(f"converting {path} to a Hugging Face checkpoint for SGLang", flush=True)
        conversion.run()
        yield str(Path(directory) / "hf")


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
