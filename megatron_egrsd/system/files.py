"""Files that are complete or absent, and the SHA-256 of a file."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from megatron_egrsd.errors import RunError

PARTIAL = ".partial"  # ends the name of an output that is still being written


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if not.

    The directory of `path` is made; an older file at `path` is replaced.
    Raises RunError, with the path and the reason, if the file cannot be written or renamed (OSError).
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # absent after the renaming, or if nothing could be written
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, all of it or nothing. Raises as `atomic` does."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
