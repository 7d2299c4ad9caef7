"""Share among the benchmarks: functions timed in turn, peak memory, Markdown tables, the machine and its load."""

import os
import platform
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.runs import ROOT


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = seconds_of,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Return the seconds of each function by `clock`, `rounds` times, in turn: a change of load meets all of them.

    `prepare(name)` runs before each call and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            prepare(name)
            seconds[name].append(clock(function))
    return seconds


def own_memory() -> int:
    """Return the anonymous memory of this process in bytes: what is resident, without pages of files."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()


class Peak:
    """The largest `own_memory` while it is open, looked at every two milliseconds."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, own_memory())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], align: str = "--:") -> str:
    """Return a Markdown table; `align` is the rule below all columns but the first."""
    lines = [columns, ["---", *[align] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def processor() -> str:
    """Return the processor's name, or its architecture if the kernel does not name it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Return the commit of this checkout, with + if files differ from it; "" outside a git checkout."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def load() -> str:
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
