"""Share among the benchmarks: functions timed in turn, Markdown tables, the load of the machine."""

import os
import time
from collections.abc import Callable, Iterable, Sequence


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
    """Seconds of each function by `clock`, `rounds` times, one after the other: a change of load meets all of them.

    `prepare(name)` runs before each call and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            prepare(name)
            seconds[name].append(clock(function))
    return seconds


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], align: str = "--:") -> str:
    """Return a Markdown table; `align` is the rule below all columns but the first."""
    lines = [columns, ["---", *[align] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def load() -> str:
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
