"""A run as train.py drives it: rollouts, checkpoints, log and reports."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_egrsd.config import Config, ObjectiveConfig
from megatron_egrsd.data.problems import Place
from megatron_egrsd.data.samples import Prompt, Rollout, save_rollouts
from megatron_egrsd.engine.distributed import on_first_rank, on_first_rank_while
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import RunError
from megatron_egrsd.evaluation.summary import change_of_accuracy, summarize_rollouts
from megatron_egrsd.hf.adapter_file import save_adapter
from megatron_egrsd.hf.checkpoint import save_hf
from megatron_egrsd.learn import Record
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.report import plot_frontier, summary_table
from megatron_egrsd.report.scored_dump import gather_scores, save_scores, scored_rollouts
from megatron_egrsd.run.checkpoints import Checkpoints, is_best
from megatron_egrsd.run.guard import UpdateGuard
from megatron_egrsd.run.health import Health
from megatron_egrsd.run.log import RunLog
from megatron_egrsd.run.preemption import Preemption
from megatron_egrsd.run.resuming import load, run_facts_after
from megatron_egrsd.run.rollout_source import RolloutSource, rollout_source
from megatron_egrsd.run.run_directory import RunDirectory
from megatron_egrsd.run.stopwatch import Stopwatch
from megatron_egrsd.run.throughput import known_peak, throughput
from megatron_egrsd.system.files import locked


@contextlib.contextmanager
def open_session(config: Config, engine: Engine, tokenizer, preemption: Preemption) -> Iterator["Session"]:
    """Yield the session of a new or resumed run; at the end, or if its start fails, end what it started."""
    with contextlib.ExitStack() as stack:
        yield Session(config, engine, tokenizer, preemption, stack)


class Session:
    """The rollouts of each step, the log, the dumps and the checkpoints of a run. Every rank makes the same calls.

    Rank 0 alone speaks to SGLang and writes files; rollouts, and every exception, reach all ranks. `stack` ends what is
    started here: first requests and servers, then the log.
    """

    def __init__(self, config: Config, engine: Engine, tokenizer, preemption: Preemption, stack: contextlib.ExitStack):
        self.config, self.engine, self.tokenizer, self.preemption = config, engine, tokenizer, preemption
        self.directory = RunDirectory(config)
        self.guard = UpdateGuard(config, self.directory)
        self.health = Health(config)
        self.peak = known_peak(config)
        self.log: RunLog | None = None  # on rank 0
        self.evaluations: list[dict[str, Any]] = []  # on rank 0
        self.history = History()  # of the steps so far; `learn` takes it
        self.unreported: tuple[int, list[Rollout], dict[str, float]] | None = None
        self.checkpoints = Checkpoints(engine, config.checkpoint, self.directory)
        on_first_rank(lambda: stack.enter_context(locked(self.directory.path)))
        self.resumed: Path | None = on_first_rank(self.directory.checkpoint_to_resume)
        self.begin = Place()
        if self.resumed:  # first: a checkpoint that is refused leaves every file where it is
            self.begin, self.history = load(engine, config, self.resumed)
        resumed_step = self.begin.step
        if config.checkpoint.resume:
            on_first_rank(lambda: self.directory.move_stale_outputs(resumed_step))
        stack.callback(self._close_log)
        stack.callback(self.checkpoints.end)  # while the directory is locked
        # Another seed after every resume: the run samples on, and not what it has sampled before.
        seed = (config.seed + 1_000_003 * resumed_step) % 2**31
        self.rollouts: RolloutSource = rollout_source(config, engine, tokenizer, preemption, seed, self.begin, stack)
        on_first_rank(self._open_log)

    def _open_log(self) -> None:
        before = self.directory.begin(self.resumed)
        self.evaluations = before.evaluations
        for row in before.steps:  # what later steps are compared with
            self.health.holding(row)
        self.log = RunLog(self.directory.path, self.config.steps, config=self.config)

    def _close_log(self) -> None:
        if self.log is not None:
            self.log.close()

    def _say(self, text: str) -> None:
        if self.engine.is_first_rank:
            self.log.message(text)

    # -- starting and stopping ------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Return the step to continue from, after giving its weights to servers that hold others."""
        if self.resumed is not None:
            self.rollouts.placement.enter("training")
        # The user's servers may hold any weights, and those of the run hold model.path without lora.init.
        if self.resumed is not None or self.config.rollout.servers.urls or self.config.lora.init:
            self.rollouts.push_weights(self.begin.step, Stopwatch())
        return self.begin.step

    def save(self, step: int) -> Path:
        """Save a checkpoint of the state after `step` steps, with the metrics so far; return its path."""
        self.rollouts.placement.enter("training")
        best = on_first_rank(lambda: is_best(self.evaluations, step))
        return self.checkpoints.save(step, asdict(self.history), best, run_facts_after(step, self.config, self.begin))

    def check_preemption(self) -> None:
        """Raise Preempted, on every rank, if any rank has been asked to stop."""
        on_first_rank(self.preemption.check)

    def stopped(self, error: RunError, step: int) -> RunError:
        """Save the state after `step` steps; return `error` with how to continue."""
        try:
            self.rollouts.placement.enter("end")
            if self.unreported:  # the weights of this update did not reach SGLang, but it was made
                self.report(*self.unreported)
            path = self.save(step)
            self.checkpoints.publish(wait=True)
        except RunError as second:
            return type(error)(f"{error}; and the state after step {step} could not be saved: {second}")
        return type(error)(f"{error}; resumable: step {step} is saved in {path}, --resume auto continues")

    def finish(self) -> None:
        """Write the final Hugging Face checkpoint, the adapter and the plot, and print the table."""
        self.rollouts.placement.enter("training")
        _export(self.engine, self.config, self.directory, self._say)
        if self.engine.is_first_rank and self.evaluations:
            plot_frontier(self.evaluations, self.directory.frontier)
            self.log.message(f"plot  {self.directory.frontier}")
            if len(self.evaluations) > 1:
                self.log.message(summary_table(self.evaluations[0], self.evaluations[-1]))

    # -- one step -------------------------------------------------------------------------------------------------

    def recorder(self, step: int, rollouts: list[Rollout]) -> Record | None:
        """Return the function that `learn` calls with the scores of `rollouts`, or None without `dump_scores`."""
        if not self.config.dump_scores:
            return None
        path = self.directory.dump("scores", step)
        return _recorder(self.engine, self.config.objective, self.tokenizer, self.history, step, rollouts, path)

    def check_update(self, step: int, rollouts: list[Rollout], metrics: dict[str, float]) -> None:
        """Dump the rollouts of a step (from 1) whose update was skipped; RunError after too many of them in a row."""
        self.unreported = step, rollouts, metrics
        if reason := self.guard.check(step, rollouts, metrics):
            self._say(reason)

    def report(self, step: int, rollouts: list[Rollout], metrics: dict[str, float]) -> None:
        """Log step `step` (from 1) and, under `dump_rollouts`, dump its rollouts."""
        self.unreported = None
        stalled = self.checkpoints.stalled()

        def write() -> None:
            if "time/step" in metrics:
                metrics.update(throughput(metrics, self.peak))
            behind = [(step - 1 - version, tokens) for r in rollouts for version, tokens in r.versions]
            metrics["rollout/staleness"] = sum(updates * tokens for updates, tokens in behind) / metrics["batch/tokens"]
            metrics["rollout/staleness/max"] = max(updates for updates, _ in behind)
            self.log.step({"step": step, "rollout/restarts": self.rollouts.restarts} | stalled | metrics)
            for warning in self.health.warnings(step, metrics):
                self.log.message(warning)
            if self.config.dump_rollouts:
                save_rollouts(rollouts, self.directory.dump("rollouts", step))

        on_first_rank(write)

    def evaluate(self, prompts: list[Prompt], step: int) -> None:
        """Log held-out avg@k with the weights after `step` steps, once a step; nothing without held-out problems."""
        if not prompts or on_first_rank(lambda: any(e["step"] == step for e in self.evaluations)):
            return
        rollouts = self.rollouts.evaluation(prompts, step)

        def write() -> None:
            result = summarize_rollouts(rollouts)
            if self.evaluations:
                result |= change_of_accuracy(self.evaluations[0], result)
            self.log.evaluation(step, result)
            self.evaluations.append(result | {"step": step})
            if is_best(self.evaluations, step):  # a resumed run has saved it before
                self.checkpoints.name_best(step)

        if rollouts:
            on_first_rank(write)


def _export(engine: Engine, config: Config, directory: RunDirectory, say: Callable[[str], None]) -> None:
    """Write the final model, the adapter or both, as `lora.export` says; `say` gets their paths."""
    base, lora, spec = config.model.path, config.lora, engine.adapter
    model, adapter = directory.model, directory.adapter
    if lora.exports_model:
        on_first_rank_while(lambda weights: save_hf(weights, base, model), engine.export_weights())
        say(f"model {model}")
    if lora.exports_adapter:
        on_first_rank_while(lambda tensors: save_adapter(tensors, spec, base, adapter), engine.export_adapter())
        say(f"adapter {adapter}")


def _recorder(engine: Engine, objective: ObjectiveConfig, tokenizer, history: History, step: int,
              rollouts: list[Rollout], path: Path) -> Record:  # fmt: skip
    """Return a function that dumps the scores of `rollouts` with the history that their advantages are taken from."""
    about: dict[str, Any] = {"step": step, "vocab_size": engine.arch.vocab_size, "history": history}

    def record(shaped_rewards, advantage, student, teacher) -> None:
        student, teacher = gather_scores(engine, student), gather_scores(engine, teacher)
        batch = rollouts, shaped_rewards, advantage, student, teacher, objective, tokenizer
        on_first_rank(lambda: save_scores(scored_rollouts(*batch, **about), path))

    return record
