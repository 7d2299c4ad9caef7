"""What the user sees of a run: one line a step, the same in metrics.jsonl and in TensorBoard.

`METRICS` is the one list of what is measured; the columns and docs/reference/metrics.md are made from it
(`python -m megatron_egrsd.run.log > docs/reference/metrics.md`). Keys that are not in it are recorded, but not shown.
"""

import json
import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import IO, NamedTuple

from rich.console import Console
from rich.text import Text


class Metric(NamedTuple):
    """A key, its column (empty: not on the line), the format of its value, and what it means with its unit."""

    key: str
    label: str
    format: str
    meaning: str


METRICS = [
    Metric("reward/mean", "reward", "6.3f", "Mean reward of the batch's rollouts."),
    Metric("reward/failed", "", "5.0f", "Rollouts whose reward function raised or took too long; they count as 0."),
    Metric("accuracy", "acc", "5.3f", "Share of rollouts with reward above 0.5."),
    Metric("response/length", "len", "6.1f", "Mean response length in tokens, end-of-turn token included."),
    Metric("response/truncated", "cut", "5.3f", "Share of responses cut off at rollout.max_response_tokens."),
    Metric("student/entropy", "H_S", "5.3f", "Mean entropy of the student's next-token distribution, nats."),
    Metric("teacher/entropy", "H_T", "5.3f", "The same of the privileged teacher, nats."),
    Metric("gate/mean", "gate", "5.3f", "Mean confidence gate g = 1 - alpha h; 1 leaves every token its weight."),
    Metric("gate/closed_share", "", "5.3f", "Share of tokens whose gate is below 1 - alpha / 2."),
    Metric("weight/clip_share", "clip", "5.3f", "Share of tokens whose ratio is outside [1 - eps_w, 1 + eps_w]."),
    Metric("weight/log_ratio", "", "7.3f", "Mean log pi_T - log pi_S of the sampled tokens, nats."),
    Metric("weight/abs_mean", "", "6.3f", "Mean absolute token weight |W|."),
    Metric("loss/policy", "", "8.4f", "Policy loss."),
    Metric("loss/clip_share", "", "5.3f", "Share of tokens that the PPO clip stops; 0 with one update a batch."),
    Metric("loss/kl", "", "6.4f", "Mean KL divergence to the initial weights, nats; 0 without objective.kl_coef."),
    Metric("loss/importance", "", "6.3f", "Mean truncated importance weight c; 1 without objective.importance_cap."),
    Metric("optimizer/grad_norm", "|grad|", "8.3g", "Global gradient norm before clipping."),
    Metric("optimizer/lr", "", "8.2g", "Learning rate."),
    Metric("optimizer/updates", "", "3.0f", "Optimizer steps taken on the batch; 0 where no rollout has a signal."),
    Metric("optimizer/skipped", "", "3.0f", "Updates skipped: numbers not finite, or engine and SGLang disagree."),
    Metric("sync/log_prob_difference", "dlogp", "7.1e", "Mean |log-prob(SGLang) - log-prob(engine)|, nats."),
    Metric("batch/tokens", "", "8.0f", "Response tokens of the batch."),
    Metric("batch/degenerate_share", "", "5.3f", "Share of rollouts without advantage: groups all right or wrong."),
    Metric("batch/sampled", "", "5.0f", "Rollouts sampled for the batch; more than it holds under dynamic sampling."),
    Metric("rollout/staleness", "", "5.2f", "Updates from the weights that sampled a token to those it trains: mean."),
    Metric("rollout/staleness/max", "", "2.0f", "The same: largest."),
    Metric("rollout/restarts", "", "3.0f", "Losses of SGLang servers so far; one that takes several counts once."),
    Metric("batch/micro_batches", "", "4.0f", "Micro-batches of the last update, per data-parallel rank."),
    Metric("perf/tokens_per_second", "tok/s", "6.0f", "Response tokens a second over the whole step, all devices."),
    Metric("time/generate", "gen", "5.1f", "Seconds of sampling and rewarding the batch."),
    Metric(
        "time/wait", "", "5.1f", "Those that training waited for: all, but less where rollout.staleness is above 0."
    ),
    Metric("time/score", "score", "5.1f", "Seconds of scoring with the teacher (and the old policy)."),
    Metric("time/train", "train", "5.1f", "Seconds of forward, backward and optimizer."),
    Metric("time/sync", "sync", "5.1f", "Seconds of sending the new weights to SGLang."),
    Metric("time/step", "", "6.1f", "Seconds of the whole step."),
    Metric("evaluation/accuracy", "", "5.3f", "Held-out avg@k: share of right responses."),
    Metric("evaluation/accuracy/low", "", "5.3f", "Its 95 % bootstrap interval over the problems: lower end."),
    Metric("evaluation/accuracy/high", "", "5.3f", "The same: upper end."),
    Metric("evaluation/pass", "", "5.3f", "Held-out pass@k: share of problems with a right response among k."),
    Metric("evaluation/length/mean", "", "6.1f", "Held-out response length in tokens: mean."),
    Metric("evaluation/length/median", "", "6.1f", "The same: median."),
    Metric("evaluation/length/p95", "", "6.1f", "The same: 95th percentile."),
    Metric("evaluation/truncated", "", "5.3f", "Held-out share of responses cut off."),
    Metric("evaluation/k", "", "3.0f", "Responses per held-out problem."),
    Metric("evaluation/problems", "", "5.0f", "Held-out problems."),
]

_BAR = 8  # characters of the progress bar
_HEADER_EVERY = 25  # lines, on a terminal; a file gets the header once


class RunLog:
    """Console, `output`/metrics.jsonl and TensorBoard event files in `output`/tensorboard.

    On a terminal the columns that do not fit are left out; a pipe gets all of them, without control codes.

    Args:
        output: Directory of the run; made where it is missing.
        total_steps: Steps of the run, for progress and remaining time.
        tensorboard: Write event files.
        file: Where the lines go instead of stdout.
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
        self.jsonl.write(json.dumps(row) + "\n")
        self.jsonl.flush()
        if self.writer:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()

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


def metrics_page() -> str:
    """docs/reference/metrics.md."""
    rows = "\n".join(
        f"| `{m.key}` | {'`' + m.label.replace('|', chr(92) + '|') + '`' if m.label else ''} "
        f"| {m.meaning.replace('|', chr(92) + '|')} |"
        for m in METRICS
    )
    return (
        "# Metrics\n\n"
        "Every step writes one object to `metrics.jsonl`, the same numbers to `tensorboard/`, and the columns below "
        "to the console.\nA number that is not finite is `null` in the file. This page is made from the table in "
        "`megatron_egrsd/run/log.py`:\n`python -m megatron_egrsd.run.log > docs/reference/metrics.md`.\n\n"
        f"| key | column | meaning |\n|---|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    print(metrics_page(), end="")
