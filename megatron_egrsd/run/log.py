"""The log of a run: one line a step on the console, the same numbers in metrics.jsonl and in TensorBoard.

The columns are those of metrics.METRICS; other keys are recorded, but not shown.
"""

import json
import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from megatron_egrsd.errors import RunError
from megatron_egrsd.run.metrics import METRICS, Metric

_BAR = 8  # characters of the progress bar
_HEADER_EVERY = 25  # lines, on a terminal; a file gets the header once


class RunLog:
    """Console (or `file`), `output`/metrics.jsonl and TensorBoard event files in `output`/tensorboard.

    On a terminal the columns that do not fit are left out; a pipe gets all of them, without control codes.
    """

    def __init__(self, output: Path, total_steps: int, tensorboard: bool = True, file: IO[str] | None = None):
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        self.total_steps = total_steps
        self.console = Console(file=file, highlight=False, soft_wrap=True)
        self.jsonl = open(output / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output / "tensorboard"))
        self.columns = self._columns()
        self.lines = 0
        self.last = time.perf_counter()
        self.seconds: deque[float] = deque(maxlen=10)  # of the latest steps

    def step(self, metrics: dict[str, float | int]) -> None:
        """Record one training step; `metrics["step"]` counts from 1."""
        step, now = int(metrics["step"]), time.perf_counter()
        self.seconds.append(float(metrics.get("time/step", now - self.last)))
        self.last = now
        self._record(step, {k: v for k, v in metrics.items() if k != "step"})
        if self.lines == 0 or (self.console.is_terminal and self.lines % _HEADER_EVERY == 0):
            self.console.print(Text(self._header(), style="bold"))
        self.lines += 1
        self.console.print(Text(self._line(step, metrics)))

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation after `step` steps (0: before training); keys as in evaluation/..."""
        self._record(step, {f"evaluation/{k}": v for k, v in metrics.items() if k != "step"})
        text = (
            f"held-out after step {step}: accuracy {_show(metrics, 'accuracy', '.3f')}  "
            f"pass@{_show(metrics, 'k', '.0f')} {_show(metrics, 'pass', '.3f')}  "
            f"length {_show(metrics, 'length/mean', '.1f')}  "
            f"truncated {_show(metrics, 'truncated', '.3f')}"
        )
        self.console.print(Text(text, style="bold green"))

    def message(self, text: str) -> None:
        """Print `text` as it is."""
        self.console.print(Text(text))

    def close(self) -> None:
        self.jsonl.close()
        if self.writer:
            self.writer.close()

    def _record(self, step: int, metrics: dict[str, float | int]) -> None:
        numbers = {k: v if isinstance(v, int) else float(v) for k, v in metrics.items()}
        # JSON has no NaN: null keeps the file readable by everything that reads JSON.
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        try:
            self.jsonl.write(json.dumps(row) + "\n")
            self.jsonl.flush()
            if self.writer:
                for key, value in numbers.items():
                    self.writer.add_scalar(key, value, step)
                self.writer.flush()
        except OSError as error:
            raise RunError(f"the metrics of step {step} cannot be written to {self.jsonl.name}: {error}") from error

    def _columns(self) -> list[Metric]:
        columns = [m for m in METRICS if m.label]
        if self.console.is_terminal:
            room = self.console.width - len(self._progress(0))
            while columns and sum(_width(m) + 1 for m in columns) > room:
                columns.pop()
        return columns

    def _header(self) -> str:
        names = " ".join(m.label.rjust(_width(m)) for m in self.columns)
        return f"{'step':<{len(self._progress(0)) - 8}}     eta {names}".rstrip()

    def _line(self, step: int, metrics: dict[str, float | int]) -> str:
        values = [_show(metrics, m.key, m.format).rjust(_width(m)) for m in self.columns]
        return " ".join([self._progress(step), *values])

    def _progress(self, step: int) -> str:
        total = str(self.total_steps)
        done = min(_BAR, _BAR * step // self.total_steps)
        left = statistics.median(self.seconds) * (self.total_steps - step) if step else 0.0
        full, empty = "█░" if self.console.encoding.lower().startswith("utf") else "#."
        bar = full * done + empty * (_BAR - done)
        return f"{step:>{len(total)}}/{total} {bar} {_duration(left):>7}"


def _width(metric: Metric) -> int:
    return max(len(metric.label), int(metric.format.partition(".")[0]))


def _show(metrics: dict, key: str, form: str) -> str:
    return format(float(metrics[key]), form) if metrics.get(key) is not None else "-"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{s:02}s" if minutes else f"{s}s"
