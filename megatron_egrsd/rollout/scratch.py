"""Removal of the files that SGLang's processes leave behind: they are killed, and a killed process removes nothing."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.system.files import lock

_PREFIX = "megatron-egrsd-"
_LOCK = "lock"
_SHORT = Path("/tmp")
# The path of a socket has at most 107 characters; behind TMPDIR come "/megatron-egrsd-XXXXXXXX/tmpXXXXXXXX".
_LONGEST = 107 - len(f"/.{_PREFIX}XXXXXXXX/tmpXXXXXXXX") - 8
_SHARED = Path("/dev/shm")
SHARED_LIST = "shared"  # file of the directory with names below /dev/shm, one per line: launch.py writes it


class Scratch:
    """A temporary directory for the servers of one run, with a list of the shared memory that they create.

    Its lock is held until its process ends for any reason. The next run removes directories with such a list that
    nobody has locked, and no others: the name alone may be a user's.
    """

    def __init__(self):
        place = _place()
        names = _clear_abandoned(place)
        hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place))
        self._lock_file = open(hidden / _LOCK, "w")  # noqa: SIM115  held until the process ends
        lock(self._lock_file, f"{hidden} is locked by another process")
        # Again at the end: the servers of a run that was killed a moment ago may not have created it yet.
        (hidden / SHARED_LIST).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        self.path = hidden.rename(hidden.with_name(hidden.name[1:]))  # visible to others only after it is locked

    def remove(self) -> None:
        """Remove the directory and the listed shared memory, after the servers have ended. Idempotent."""
        if not self._lock_file.closed:
            _clear(self.path, self._lock_file)


def clear_abandoned() -> None:
    """Remove what the servers of killed runs have left, for a run that starts none of its own."""
    _clear_abandoned(_place())


def _clear_abandoned(place: Path) -> list[str]:
    names = []
    for listed in place.glob(f"{_PREFIX}*/{SHARED_LIST}"):
        with contextlib.suppress(OSError):  # locked by a live process, another user's, or on a disk without locks
            if listed.is_file():
                names += _clear(listed.parent, _lock_abandoned(listed.parent))
    return names


def _place() -> Path:
    """Return the directory for temporary files: TMPDIR's, or /tmp if the names of SGLang's sockets would be too long.

    Raises BadArgument, naming TMPDIR, if neither can be used.
    """
    wanted = Path(tempfile.gettempdir())
    for place in (wanted, _SHORT):
        if len(os.fsencode(place.absolute())) <= _LONGEST and place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            return place
    raise BadArgument(
        f"TMPDIR is {wanted}, more than the {_LONGEST} characters that leave room for the names of SGLang's sockets, "
        f"and {_SHORT} cannot be written; set TMPDIR to a shorter path"
    )


def _lock_abandoned(directory: Path) -> IO:
    """Return the open file of the lock that a killed process has left. OSError if it is held, or nobody can tell."""
    file = open(directory / _LOCK, "w")  # noqa: SIM115  _clear closes it
    try:
        # Not files.lock, which takes a file system without locks for a lock: here nothing may be removed then.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _clear(directory: Path, held: IO) -> list[str]:
    """Remove `directory` and the shared memory that it lists; returns the names of the latter."""
    listed = directory / SHARED_LIST
    names = listed.read_text(encoding="utf-8").split() if listed.is_file() else []
    for name in names:
        (_SHARED / Path(name).name).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    held.close()
    return names
