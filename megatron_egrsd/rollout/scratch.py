"""The files that SGLang's processes would leave behind: they are killed, and a killed process tidies nothing up."""

import contextlib
import fcntl
import shutil
import tempfile
from pathlib import Path

import psutil

_PREFIX = "megatron-egrsd-"
_SHARED = Path("/dev/shm")
_LIST = "shared"  # names in there, one a line


class Scratch:
    """A temporary directory for the servers of one run, which also lists the shared memory they have made.

    It holds a lock as long as its process lives, however that ends: the next run clears directories nobody holds.
    """

    def __init__(self):
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):  # somebody's who lives, or another user's
                _clear(path, _lock(path))
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
        self._held = _lock(made)
        self._noted: set[str] = set()
        self.path = made.rename(made.with_name(made.name[1:]))  # visible to others only now that it is held

    def note(self, processes: list[psutil.Process]) -> None:
        """Remember SGLang's shared memory that `processes` have mapped."""
        names: set[str] = set()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                names |= {Path(m.path).name for m in process.memory_maps() if m.path.startswith(f"{_SHARED}/sglang")}
        with open(self.path / _LIST, "a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in sorted(names - self._noted))
        self._noted |= names

    def remove(self) -> None:
        """Once the servers are gone. Idempotent."""
        if not self._held.closed:
            _clear(self.path, self._held)


def _lock(directory: Path):
    """The open lock file; OSError where another process holds it."""
    file = open(directory / "lock", "w")  # noqa: SIM115  held until the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _clear(directory: Path, held) -> None:
    listed = directory / _LIST
    for name in listed.read_text(encoding="utf-8").split() if listed.is_file() else ():
        (_SHARED / Path(name).name).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    held.close()
