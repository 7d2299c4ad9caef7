"""The line a step: columns of metrics.METRICS, progress, and the time that is left."""

import statistics
from collections.abc import Iterable

from megatron_egrsd.run.metrics import METRICS, Metric

_BAR = 8  # characters of the progress bar
RECENT = 10  # steps whose median time tells how long the rest takes


class StepLine:
    """The header and the lines of a run of `total_steps`, with the columns that fit `width`; all of them for None.

    `blocks` says that the output shows the characters of the progress bar.
    """

    def __init__(self, total_steps: int, width: int | None = None, blocks: bool = True):
        self.total_steps, self.blocks = total_steps, "█░" if blocks else "#."
        self.columns = [m for m in METRICS if m.label]
        if width is not None:
            room = width - len(self._progress(0, []))
            while self.columns and sum(_width(m) + 1 for m in self.columns) > room:
                self.columns.pop()

    def header(self) -> str:
        names = " ".join(m.label.rjust(_width(m)) for m in self.columns)
        return f"{'step':<{len(self._progress(0, [])) - 8}}     eta {names}".rstrip()

    def line(self, step: int, metrics: dict[str, float | int], seconds: Iterable[float]) -> str:
        """Return the line of `step`; `seconds` are the times of the latest steps, this one included."""
        values = [show(metrics, m.key, m.format).rjust(_width(m)) for m in self.columns]
        return " ".join([self._progress(step, seconds), *values])

    def seconds_left(self, step: int, seconds: Iterable[float]) -> float:
        latest = list(seconds)[-RECENT:]
        return statistics.median(latest) * max(0, self.total_steps - step) if latest else 0.0

    def _progress(self, step: int, seconds: Iterable[float]) -> str:
        total = str(self.total_steps)
        done = min(_BAR, _BAR * step // self.total_steps)
        bar = self.blocks[0] * done + self.blocks[1] * (_BAR - done)
        return f"{step:>{len(total)}}/{total} {bar} {duration(self.seconds_left(step, seconds)):>7}"


def _width(metric: Metric) -> int:
    return max(len(metric.label), int(metric.format.partition(".")[0]))


def show(metrics: dict, key: str, form: str) -> str:
    """Return a metric in the format `form`, or a dash if it is missing."""
    return format(float(metrics[key]), form) if metrics.get(key) is not None else "-"


def duration(seconds: float) -> str:
    """Return "42s", "5m07s" or "3h20m"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{s:02}s" if minutes else f"{s}s"
