"""The log of a run: one line a step on the console, the same numbers in metrics.jsonl and in TensorBoard.

The line shows the columns of metrics.METRICS; other keys are recorded, but not shown.
"""

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from megatron_egrsd.config import Config
from megatron_egrsd.errors import RunError
from megatron_egrsd.run.step_line import RECENT, StepLine, show
from megatron_egrsd.run.wandb_log import WandbLog

_HEADER_EVERY = 25  # lines, on a terminal; a file gets the header once


class RunLog:
    """Console (or `file`), `output`/metrics.jsonl and TensorBoard event files in `output`/tensorboard.

    `config` names further places (logging.wandb).
    On a terminal the columns that do not fit are left out; a pipe gets all of them, without control codes.
    """

    def __init__(
        self,
        output: Path,
        total_steps: int,
        tensorboard: bool = True,
        file: IO[str] | None = None,
        config: Config | None = None,
    ):
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        self.console = Console(file=file, highlight=False, soft_wrap=True)
        self.jsonl = open(output / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output / "tensorboard"))
        self.wandb = WandbLog(config, self.message) if config and config.logging.wandb.project else None
        width = self.console.width if self.console.is_terminal else None
        self.text = StepLine(total_steps, width, blocks=self.console.encoding.lower().startswith("utf"))
        self.lines = 0
        self.last = time.perf_counter()
        self.seconds: deque[float] = deque(maxlen=RECENT)  # of the latest steps

    def step(self, metrics: dict[str, float | int]) -> None:
        """Record one training step; `metrics["step"]` counts from 1."""
        step, now = int(metrics["step"]), time.perf_counter()
        self.seconds.append(float(metrics.get("time/step", now - self.last)))
        self.last = now
        self._record(step, {k: v for k, v in metrics.items() if k != "step"})
        if self.lines == 0 or (self.console.is_terminal and self.lines % _HEADER_EVERY == 0):
            self.console.print(Text(self.text.header(), style="bold"))
        self.lines += 1
        self.console.print(Text(self.text.line(step, metrics, self.seconds)))

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Record an evaluation after `step` steps (0: before training); keys as in evaluation/..."""
        self._record(step, {f"evaluation/{k}": v for k, v in metrics.items() if k != "step"})
        text = (
            f"held-out after step {step}: accuracy {show(metrics, 'accuracy', '.3f')}  "
            f"pass@{show(metrics, 'k', '.0f')} {show(metrics, 'pass', '.3f')}  "
            f"length {show(metrics, 'length/mean', '.1f')}  "
            f"truncated {show(metrics, 'truncated', '.3f')}"
        )
        self.console.print(Text(text, style="bold green"))

    def message(self, text: str) -> None:
        """Print `text` as it is."""
        self.console.print(Text(text))

    def close(self) -> None:
        self.jsonl.close()
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.close()

    def _record(self, step: int, metrics: dict[str, Any]) -> None:
        lists = {k: v for k, v in metrics.items() if isinstance(v, list)}  # nothing but the file can take them
        numbers = {k: v if isinstance(v, int) else float(v) for k, v in metrics.items() if k not in lists}
        # JSON has no NaN: null keeps the file readable by everything that reads JSON.
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in numbers.items()} | lists
        try:
            self.jsonl.write(json.dumps(row) + "\n")
            self.jsonl.flush()
            if self.writer:
                for key, value in numbers.items():
                    self.writer.add_scalar(key, value, step)
                self.writer.flush()
        except OSError as error:
            raise RunError(f"the metrics of step {step} cannot be written to {self.jsonl.name}: {error}") from error
        if self.wandb:
            self.wandb.record(step, numbers)
