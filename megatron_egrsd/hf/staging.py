"""Output that is complete or absent: written in a temporary directory beside its place, renamed at the end."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.system.files import PARTIAL, check_outside, check_writable, lock


@contextlib.contextmanager
def staged(path: str | Path, nbytes: int = 0) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `path` when the block succeeds and removed when it fails.

    A killed process leaves `path`.partial behind; the next run with the same `path` removes it. Raises BadArgument if
    `path` exists or another process is writing it, RunError if `nbytes` do not fit or a write fails.
    """
    path = Path(path).absolute()
    check_absent(path)
    temporary = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=True)
    except OSError as error:
        raise BadArgument(f"{temporary} cannot be made: {error.strerror}") from None
    with _locked(temporary):
        try:
            _empty(temporary)
            check_space(temporary, nbytes)
            yield temporary
            check_absent(path)
            temporary.rename(path)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # EFBIG: the process's limit on the size of a file.
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise RunError(f"no room to write {path} ({error.strerror}); nothing was left there") from None
            raise RunError(f"{path} was not written: {error}") from None
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_absent(path: Path) -> None:
    """Raise BadArgument if `path` exists: nothing is ever overwritten."""
    if os.path.lexists(path):
        raise BadArgument(f"{path} exists already; choose another directory or remove it")


def check_target(target: Path, source: Path) -> None:
    """Raise BadArgument if `target`, a conversion of `source`, exists, lies within `source` or cannot be made."""
    check_absent(target)
    check_outside(target, "the target", source, "the source")
    check_writable(target.parent, "the target's directory")


def free_bytes(path: str | Path) -> int:
    """Return the free bytes of the file system that will hold `path`, which need not exist yet."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(path: Path, nbytes: int) -> None:
    """Raise RunError if `nbytes` do not fit at `path`."""
    free = free_bytes(path)
    if free < nbytes:
        raise RunError(f"{path.parent} has {free / 1e9:.1f} GB free, but {nbytes / 1e9:.1f} GB are needed")


def _empty(directory: Path) -> None:
    for child in directory.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        else:
            child.unlink()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock `directory` against other processes. The lock ends with its process, so a killed run blocks nobody."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        lock(handle, f"another process is writing {directory}; wait for it")
        yield
    finally:
        os.close(handle)
