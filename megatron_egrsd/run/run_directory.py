"""The output directory of a run: config.yaml, dumps, checkpoints, history. Rank 0 reads and writes it."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path

import yaml

from megatron_egrsd.config import Config
from megatron_egrsd.data.dump_files import dump_path, dumps_in
from megatron_egrsd.engine import checkpoint
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report.runs import Run, read_run
from megatron_egrsd.rollout.scratch import clear_abandoned
from megatron_egrsd.system.files import write_text


class RunDirectory:
    """The directory of a new or a resumed run, which it prepares, and the names of its files."""

    def __init__(self, config: Config):
        self.config = config
        self.path = Path(config.output)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / checkpoint.METRICS_FILE
        self.model = self.path / "hf"
        self.adapter = self.path / "adapter"
        self.frontier = self.path / "frontier.png"

    def checkpoint_to_resume(self) -> Path | None:
        """Return the checkpoint that `checkpoint.resume` asks for; BadArgument if nothing is left to do after it.

        A run that was killed behind its last step has its export left.
        """
        wanted = self.config.checkpoint.resume
        path = checkpoint.find(self.checkpoints, wanted) if wanted else None
        if path is not None and checkpoint.step_of(path) >= self.config.steps and self._is_exported():
            clear_abandoned()  # it may have been killed while it closed its servers, and this start has none
            raise BadArgument(f"{path} is the end of a run of {self.config.steps} steps; raise steps to train on")
        return path

    def _is_exported(self) -> bool:
        lora = self.config.lora
        wanted = [(self.model, lora.exports_model), (self.adapter, lora.exports_adapter)]
        return all(path.is_dir() for path, is_exported in wanted if is_exported)

    def move_stale_outputs(self, step: int) -> None:
        """Rename what the resumed run writes again: dumps and checkpoints after `step`, exports, metrics, logs.

        It deletes nothing. `begin` then restores the metrics up to `step`, and overwrites config.yaml.
        """
        kinds = "rollouts", "scores", "skipped"
        stale = [p for kind in kinds for s, p in dumps_in(self.path / kind).items() if s > step]
        stale += checkpoint.later(self.checkpoints, step)
        again = [p for pattern in ("hf", "adapter", "metrics.jsonl", "logs/**/*.log") for p in self.path.glob(pattern)]
        for left in [*stale, *again]:
            left.rename(left.with_name(f"{left.name}.before-{time.time_ns()}"))

    def begin(self, resumed: Path | None) -> Run:
        """Write config.yaml, restore the metrics of a resumed run, and return them; none if the run is new."""
        before = read_run(resumed or self.path, begun=False)
        write_text(self.path / "config.yaml", yaml.safe_dump(asdict(self.config), sort_keys=False))
        if resumed and (resumed / checkpoint.METRICS_FILE).is_file():
            shutil.copyfile(resumed / checkpoint.METRICS_FILE, self.metrics)
        return before

    def dump(self, kind: str, step: int) -> Path:
        """Return the file of `step` (from 1) among the dumps of a kind: "rollouts", "scores" or "skipped"."""
        return dump_path(self.path / kind, step)
