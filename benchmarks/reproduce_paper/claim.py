"""A claim on a cell: of all nodes that share a file system, one works on it.

A directory has claims claim-000001.json, claim-000002.json, ...; the newest counts. A file is created exclusively, so
one of several processes gets the next number. Its holder touches it; the cell is free again if the claim was released,
if its process has ended on this machine, or if nobody has touched the file for STALE seconds. Files are marked, never
removed: a process that has slept between looking and creating finds its number taken.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_egrsd.system.files import write_text

STALE = 300.0  # seconds
_BEAT = 20.0  # seconds between touches


class Claim:
    """A claim that this process holds. `lost` is set if another one has taken the cell over meanwhile."""

    def __init__(self, path: Path):
        self.path, self.lost, self._ended = path, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        write_text(self.path, json.dumps({"released": True}))

    def _touch(self) -> None:
        while not self._ended.wait(_BEAT):
            if _newest(self.path.parent) != self.path:
                self.lost.set()
                return
            with contextlib.suppress(OSError):  # a server of files that is away for a moment
                os.utime(self.path)


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[Claim | None]:
    """Hold the claim on `directory`, which is made; None if another process holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    if (claim := _take(directory)) is None:
        yield None
        return
    try:
        yield claim
    finally:
        claim.release()


def holder(directory: Path) -> str:
    """Return "HOST, process PID" of the process that works on `directory`, or "" if it is free."""
    if (path := _newest(directory)) is None:
        return ""
    try:
        content = json.loads(path.read_text(encoding="utf-8") or "{}")  # empty: created a moment ago
        age = _now(directory) - path.stat().st_mtime
    except (OSError, ValueError):
        return "another process"
    if content.get("released") or age > STALE:
        return ""
    if content.get("machine") == _machine() and not _lives(content["pid"], content["started"]):
        return ""
    return f"{content.get('host', '?')}, process {content.get('pid', '?')}"


def _take(directory: Path) -> Claim | None:
    newest = _newest(directory)
    if holder(directory):
        return None
    number = int(newest.stem.rpartition("-")[2]) + 1 if newest else 1
    path, pid = directory / f"claim-{number:06d}.json", os.getpid()
    about = {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _start_of(pid)}
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(about))
    except FileExistsError:
        return None
    return Claim(path)


def _newest(directory: Path) -> Path | None:
    return max(directory.glob("claim-??????.json"), default=None)


def _now(directory: Path) -> float:
    """Return the time by the clock that dates the directory's files, which may be another machine's."""
    probe = directory / f".clock-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """Return what process numbers are unique in: this boot of the kernel and its namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _lives(pid: int, started: str) -> bool:
    return _start_of(pid) == started


def _start_of(pid: int) -> str:
    """Return the time at which a process started, in the kernel's ticks, or "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
