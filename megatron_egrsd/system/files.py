"""Files that are complete or absent, output directories that one process writes, and the SHA-256 of a file."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_egrsd.errors import BadArgument, RunError

_LOCK = ".lock"  # of an output directory
_OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENOENT, errno.EIO, errno.ENAMETOOLONG, errno.ESTALE,
}  # fmt: skip
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


def lock(file: int | IO, taken: str) -> None:
    """Lock an open file until it is closed or its process ends. Raises BadArgument(`taken`) if another process did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadArgument(taken) from None
    except OSError:  # a file system without locks
        pass


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of an output directory, which is made if it is missing.

    The lock is that of an open file and ends with its process, also a killed one. Raises BadArgument if another process
    holds it, RunError if the directory cannot be written.
    """
    path, new = directory / _LOCK, not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115  closed below
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    with file:
        lock(file, f"another run is writing {directory}; wait for its end, stop it, or choose another output")
        try:
            yield
        finally:
            if new and is_empty(directory):  # nothing was written: leave no trace
                path.unlink()
                directory.rmdir()


def is_locked(directory: Path) -> bool:
    """Return whether a process of this machine holds the lock of an output directory. Takes no lock itself.

    False also if the machine does not list its locks (/proc/locks of Linux).
    """
    try:
        status, held = (directory / _LOCK).stat(), Path("/proc/locks").read_text()
    except OSError:
        return False
    place = f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    return any(" FLOCK " in line and place in line for line in held.splitlines())


def is_empty(directory: Path) -> bool:
    """Return whether a directory holds nothing but the lock that an earlier run has left, unlocked."""
    return all(path.name == _LOCK for path in directory.iterdir())


def check_writable(path: Path, key: str) -> None:
    """Raise BadArgument, beginning with `key`, if no directory can be made at `path`, or it cannot be written."""
    path = path.absolute()
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise BadArgument(f"{key} = {path} cannot be a directory, because {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = "lies on a read-only file system" if read_only else "is not writable for this user"
        raise BadArgument(f"{key} = {path} cannot be written, because {existing} {reason}")


def check_outside(path: Path, key: str, source: Path, source_key: str) -> None:
    """Raise BadArgument if the output `path` is `source` or lies within it, and would become one of its files."""
    if path.resolve().is_relative_to(source.resolve()):
        raise BadArgument(
            f"{key} = {path} lies within {source_key} = {source} and would become one of its files; choose a place "
            "outside"
        )


def disk_error(error: BaseException) -> str:
    """Return a sentence with the path for an error of the disk, "" for any other error, such as a connection's."""
    if not isinstance(error, OSError) or error.errno not in _OF_THE_DISK:
        return ""
    return f"cannot read or write {error.filename or 'a file'}: {error.strerror}"


def handles_error(error: BaseException) -> str:
    """Return a sentence for the refusal to open one more file, "" for any other error. gloo's is a RuntimeError."""
    if getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE) and "Too many open files" not in str(error):
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files; a process may open {limit} here: raise the limit (ulimit -n)"


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises BadArgument if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadArgument(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise BadArgument(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise BadArgument(f"{path} is not a JSON object")
    return content


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
