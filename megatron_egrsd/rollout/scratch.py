"""Removal of the files that SGLang's processes leave behind: they are killed, and a killed process removes nothing."""

import contextlib
import fcntl
import shutil
import tempfile
from pathlib import Path

import psutil

_PREFIX = "megatron-egrsd-"
_SHARED = Path("/dev/shm")
_SHARED_LIST = "shared"  # file with names below /dev/shm, one per line


class Scratch:
    """A temporary directory for the servers of one run, with a list of the shared memory that they have created.

    Its lock is held until its process ends for any reason. The next run removes directories that nobody has locked.
    """

    def __init__(self):
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):  # locked by a live process, or another user's
                _clear(path, _lock(path))
        hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._lock_file = _lock(hidden)
        self._listed: set[str] = set()
        self.path = hidden.rename(hidden.with_name(hidden.name[1:]))  # visible to others only after it is locked

    def note(self, processes: list[psutil.Process]) -> None:
        """List SGLang's shared memory that `processes` have mapped, for its removal."""
        names: set[str] = set()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                names |= {Path(m.path).name for m in process.memory_maps() if m.path.startswith(f"{_SHARED}/sglang")}
        with open(self.path / _SHARED_LIST, "a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in sorted(names - self._listed))
        self._listed |= names

    def remove(self) -> None:
        """Remove the directory and the listed shared memory, after the servers have ended. Idempotent."""
        if not self._lock_file.closed:
            _clear(self.path, self._lock_file)


def _lock(directory: Path):
    """Lock `directory`; returns the open lock file. Raises OSError if another process holds the lock."""
    file = open(directory / "lock", "w")  # noqa: SIM115  held until the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _clear(directory: Path, held) -> None:
    listed = directory / _SHARED_LIST
    for name in listed.read_text(encoding="utf-8").split() if listed.is_file() else ():
        (_SHARED / Path(name).name).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    held.close()
