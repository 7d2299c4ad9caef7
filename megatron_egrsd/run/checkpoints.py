"""The checkpoints of a run: at once, or while training goes on."""

from pathlib import Path
from typing import Any

from megatron_egrsd.config import CheckpointConfig
from megatron_egrsd.engine import checkpoint
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.run.run_directory import RunDirectory
from megatron_egrsd.run.stopwatch import Stopwatch


class Checkpoints:
    """A run's checkpoints: they are saved, and then given their names. Every rank makes the same calls.

    Under `checkpoint.asynchronous` a checkpoint is there after `publish`, which `save` calls for the one before.
    """

    def __init__(self, engine: Engine, config: CheckpointConfig, directory: RunDirectory):
        self.engine, self.config, self.directory = engine, config, directory
        self._saving: checkpoint.Saving | None = None  # in the background, and not published
        self._stalled = Stopwatch()  # of training, since the last report

    def save(self, step: int, history: dict[str, Any], best: bool, run_facts: dict[str, Any]) -> Path:
        """Save the state after `step` steps, with the metrics so far; return its path. Raises RunError."""
        self.publish(wait=True)
        directory, background = self.directory, self.config.asynchronous
        arguments = step, self.config.keep, history, directory.metrics, best, run_facts
        with self._stalled("time/checkpoint"):
            saving = checkpoint.save(self.engine, directory.checkpoints, *arguments, background=background)
        self._saving = saving if background else None
        return saving.path

    def name_best(self, step: int) -> None:
        """Make the checkpoint of `step` the best one, if it is there already. On rank 0 alone."""
        checkpoint.name_best(self.directory.checkpoints, step)

    def publish(self, wait: bool = False) -> None:
        """Give a checkpoint its name that was saved in the background, if it is written or `wait`.

        Raises RunError, on every rank, if it could not be written.
        """
        with self._stalled("time/checkpoint"):
            if self._saving is None or not (wait or self._saving.written()):
                return
            saving, self._saving = self._saving, None  # also if it fails: it is not tried again
            saving.publish()

    def end(self) -> None:
        """Wait until this rank writes no more. An unpublished checkpoint is removed before the next one."""
        if self._saving is not None:
            self._saving.wait()

    def stalled(self) -> dict[str, float]:
        """Return the metric of the time that training stood still for checkpoints since the last call."""
        seconds, self._stalled = self._stalled.seconds, Stopwatch()
        return seconds


def is_best(evaluations: list[dict[str, Any]], step: int) -> bool:
    """Return whether the last of a run's `evaluations` is of `step`, and none before it was more accurate."""
    if not evaluations or evaluations[-1]["step"] != step:
        return False
    return evaluations[-1]["accuracy"] == max(evaluation["accuracy"] for evaluation in evaluations)
