"""Seconds of the parts of a step."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Sums of the seconds spent in `with watch(name):` blocks, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
