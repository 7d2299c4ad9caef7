"""What only the first rank does: SGLang, the reward, the log, the files. train.py calls it from every rank."""

import contextlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import yaml

from megatron_egrsd.config import Config
from megatron_egrsd.data.samples import Prompt, Rollout, load_replay, save_rollouts
from megatron_egrsd.engine import checkpoint
from megatron_egrsd.engine.distributed import on_first_rank, on_first_rank_while
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.evaluation.summary import summarize_rollouts
from megatron_egrsd.fleet.colocation import Apart, Colocation
from megatron_egrsd.fleet.fleet import Fleet
from megatron_egrsd.hf.checkpoint import save_hf
from megatron_egrsd.learn import Record
from megatron_egrsd.objectives.load import needs_teacher
from megatron_egrsd.report import plot_frontier, read_evaluations, summary_table
from megatron_egrsd.report.scored_dump import gather_scores, save_scores, scored_rollouts
from megatron_egrsd.rewards.reward import load_reward
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import ServersLost
from megatron_egrsd.run.log import RunLog
from megatron_egrsd.run.preemption import Preemption
from megatron_egrsd.sampling.batches import Batch, Batches, check_versions
from megatron_egrsd.sampling.partial_batches import Stream
from megatron_egrsd.sampling.sampler import Sampler

T = TypeVar("T")
# Why an update was skipped: learn's metric, and what to tell the user.
_SKIPPED = {
    "skipped/log_prob": "a log-prob, SGLang's or the engine's, is not finite",
    "skipped/loss": "the loss is not finite",
    "skipped/gradient": "the gradient is not finite",
    "skipped/disagreement": "SGLang's log-probs differ from the engine's by {difference:.3g} nats on average "
    "(max_log_prob_difference = {limit:g}): it holds other weights, which rollout.verify_sync true would name, "
    "computes differently or, under rollout.staleness, is further behind than its updates should leave it",
}


def first_rank(config: Config, engine: Engine, tokenizer, preemption: Preemption) -> "FirstRank":
    """What `config.debug` asks for: with SGLang, or without."""
    return (Replay if config.debug == "train-only" else FirstRank)(config, engine, tokenizer, preemption)


class FirstRank:
    """SGLang, the reward and the log, all on the first rank. Every rank makes the same calls; results reach all."""

    def __init__(self, config: Config, engine: Engine, tokenizer, preemption: Preemption):
        self.config, self.engine, self.tokenizer, self.preemption = config, engine, tokenizer, preemption
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.evaluations: list[dict[str, float]] = []
        self.skipped = 0  # steps in a row
        self.ending = False
        self.unreported: tuple[int, list[Rollout], dict[str, float]] | None = None

    def __enter__(self) -> "FirstRank":
        self.stack = contextlib.ExitStack()
        try:
            self.resumed = on_first_rank(self._checkpoint_to_resume)
            on_first_rank(self._make_room)
            self._start_servers()
            on_first_rank(self._start_log)
        except BaseException:
            self.stack.close()
            raise
        return self

    def _checkpoint_to_resume(self) -> Path | None:
        wanted = self.config.checkpoint.resume
        path = checkpoint.find(self.checkpoints, wanted) if wanted else None
        if path is not None and checkpoint.step_of(path) >= self.config.steps:
            raise BadArgument(f"{path} is the end of a run of {self.config.steps} steps; raise steps to train on")
        return path

    def _make_room(self) -> None:
        if self.config.checkpoint.resume:
            self._clear(checkpoint.step_of(self.resumed) if self.resumed else 0)

    def _start_log(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "config.yaml").write_text(yaml.safe_dump(asdict(self.config), sort_keys=False), encoding="utf-8")
        if self.resumed and (history := self.resumed / checkpoint.HISTORY).is_file():
            shutil.copyfile(history, self.output / history.name)
            with contextlib.suppress(BadArgument):  # it may hold no evaluation
                self.evaluations = read_evaluations(self.output)
        self.log = RunLog(self.output, self.config.steps)
        self.stack.callback(self.log.close)

    def _start_servers(self) -> None:
        config = self.config.rollout
        self.fleet = Fleet(self.config, self.engine)
        self.turns = Colocation(self.fleet) if config.colocated else Apart(self.fleet)
        if self.engine.is_first_rank:
            on_nodes = f" on each of {nodes} nodes" if (nodes := len(self.fleet.nodes)) > 1 else ""
            where = f"{config.engines} SGLang server(s){on_nodes}, log in {self.output / 'logs'}"
            print(f"rollouts: {', '.join(config.urls) or where}; starting takes up to a minute", flush=True)
            # Outlives the servers: one that it starts anew would die with it (rollout/launch_guard.py).
            self.thread = self.stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sample-ahead"))
        self.stack.callback(self.fleet.close)
        # A continued run draws on, and does not sample what it has sampled before.
        seed = self.config.seed + (1_000_003 * checkpoint.step_of(self.resumed) if self.resumed else 0)
        self.fleet.start(seed % 2**31)
        self.servers = self.fleet.servers
        on_first_rank(self._prepare_sampling)

    def _prepare_sampling(self) -> None:
        config = self.config
        client = RolloutClient(self.servers, config.rollout, [self.tokenizer.eos_token_id], self._check)
        self.sampler = Sampler(client, self.tokenizer, load_reward(config.data.reward, config.data.reward_timeout))
        self.batches = (Stream if config.rollout.partial else Batches)(self.sampler, self.thread, config)
        self.stack.callback(self._end_sampling)

    def _check(self) -> None:
        """Called while requests are in flight; what it raises ends their sampling."""
        self.preemption.check()
        if self.ending:
            raise RunError("the run has ended")

    def _end_sampling(self) -> None:
        self.ending = True
        with contextlib.suppress(Exception):
            self.batches.wait()

    def _clear(self, step: int) -> None:
        """What the stopped run left behind its last checkpoint makes room, and is not lost."""
        dumps = [p for kind in ("rollouts", "scores", "skipped") for p in self.output.glob(f"{kind}/step_*.jsonl")]
        stale = [p for p in dumps if int(p.stem.removeprefix("step_")) > step]
        again = [p for pattern in ("hf", "metrics.jsonl", "logs/*.log") for p in self.output.glob(pattern)]
        for left in [*stale, *again]:
            left.rename(left.with_name(f"{left.name}.before-{time.time_ns()}"))

    def __exit__(self, *exception) -> None:
        self.stack.close()

    # -- stopping and continuing ----------------------------------------------------------------------------------

    def resume(self) -> int:
        """The step to continue from: 0, or that of the checkpoint to resume, which is then loaded and served."""
        if self.resumed is None:
            if self.config.rollout.urls:  # servers of somebody else's: who knows what they hold
                self.push_weights(0)
            return 0
        self.turns.training()
        step = checkpoint.load(self.engine, self.resumed)
        self.push_weights(step)
        self._say(f"continuing from {self.resumed}")
        return step

    def save(self, step: int) -> Path:
        """A checkpoint of the state after `step` steps, with the metrics so far."""
        self.turns.training()
        accuracies = [e["accuracy"] for e in self.evaluations]
        best = on_first_rank(
            lambda: bool(accuracies) and self.evaluations[-1]["step"] == step and accuracies[-1] == max(accuracies)
        )
        keep, history = self.config.checkpoint.keep, self.output / checkpoint.HISTORY
        return checkpoint.save(self.engine, self.checkpoints, step, keep, history, best)

    def check_preemption(self) -> None:
        """Preempted, on every rank, where any rank has been asked to stop."""
        on_first_rank(self.preemption.check)

    def stopped(self, error: RunError, step: int) -> RunError:
        """Save the state after `step` steps, and say in the error how to continue."""
        try:
            self.turns.end()
            if self.unreported:  # its weights did not reach SGLang, but it was made
                self.report(*self.unreported)
            path = self.save(step)
        except RunError as second:
            return type(error)(f"{error}; and the state after step {step} could not be saved: {second}")
        return type(error)(f"{error}; resumable: step {step} is saved in {path}, --resume auto continues")

    def _say(self, text: str) -> None:
        if self.engine.is_first_rank:
            self.log.message(text)

    # -- SGLang -------------------------------------------------------------------------------------------------

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        """The batch of step `step` (from 0), on every rank: sampled ahead, or else now with the weights of `step`.

        Servers that die meanwhile are replaced; what is missing then is sampled with the weights of `step`.
        """
        batch = self._sampled(lambda: self.batches.batch(prompts, step), step)
        check_versions(batch.rollouts, step, self.config.rollout.staleness)
        self.turns.training()
        return batch

    def _sampled(self, sample: Callable[[], T], version: int) -> T:
        """What `sample` returns on the first rank, with servers that hold the weights of `version`."""
        if self.turns.turn == "training":  # they gave them up, for a checkpoint
            self.push_weights(version)
        while True:
            try:
                return on_first_rank(sample)
            except ServersLost:  # they are starting again; every rank has a part of the weights they need
                self.push_weights(version)

    def sample_ahead(self, prompts: list[Prompt], step: int) -> None:
        """Begin what `step` needs with the weights that SGLang holds. Nothing where on-policy."""
        if self.config.rollout.staleness and self.engine.is_first_rank and step < self.config.steps:
            self.batches.ahead(prompts, step)

    def await_sampling(self) -> None:
        """Return, on every rank, when no request is in flight, finished or stopped: weights never change under one.

        RunError where the next batch cannot be had; what can be mended, or ends the run anyway, waits for `batch`.
        """
        if self.config.rollout.staleness:
            on_first_rank(lambda: self.batches.wait())

    def _sample(self, prompts: list[Prompt], n: int, temperature: float, version: int) -> list[Rollout]:
        done: dict = {}  # what was sampled survives the servers
        return self._sampled(lambda: self.sampler.sample(prompts, n, temperature, done), version)

    def push_weights(self, version: int) -> None:
        """The engine's weights into SGLang; every rank streams its part. RunError names what did not arrive."""
        while True:
            try:
                self.turns.transfer()
                self.fleet.push(version)
                self.turns.sampling()
                return
            except ServersLost as lost:
                self.fleet.mark_lost(str(lost))
                self.turns.give_way()
                self._say(f"the weights did not arrive: {lost}; sending them again")

    # -- the log ------------------------------------------------------------------------------------------------

    def recorder(self, step: int, rollouts: list[Rollout]) -> Record | None:
        """What `learn` calls with the scores of `rollouts` where dump_scores is set; None where it is not."""

        def record(advantage, student, teacher) -> None:
            student, teacher = gather_scores(self.engine, student), gather_scores(self.engine, teacher)
            objective, vocab_size = self.config.objective, self.engine.arch.vocab_size
            batch = rollouts, advantage, student, teacher, objective, self.tokenizer
            path = self.output / "scores" / f"step_{step:06d}.jsonl"
            on_first_rank(lambda: save_scores(scored_rollouts(*batch, step=step, vocab_size=vocab_size), path))

        return record if self.config.dump_scores else None

    def guard(self, step: int, rollouts: list[Rollout], metrics: dict[str, float]) -> None:
        """Keep the rollouts of a step whose update was skipped, with a word why; RunError after too many in a row."""
        self.unreported = step, rollouts, metrics
        values = {"difference": metrics.get("sync/log_prob_difference"), "limit": self.config.log_prob_limit}
        reasons = [text.format(**values) for key, text in _SKIPPED.items() if metrics.get(key)]
        if not reasons:
            self.skipped = 0
            return
        self.skipped += 1
        path = self.output / "skipped" / f"step_{step:06d}.jsonl"
        on_first_rank(lambda: save_rollouts(rollouts, path))
        sentence = f"step {step} is skipped: {reasons[0]}; its rollouts are in {path}"
        if self.skipped > self.config.max_skipped_steps:
            raise RunError(f"{sentence}; {self.skipped} in a row are too many (max_skipped_steps)")
        self._say(sentence)

    def evaluate(self, prompts: list[Prompt], step: int) -> None:
        """Held-out avg@k with the weights of `step`, logged; nothing without held-out problems or a second time."""
        if not prompts or on_first_rank(lambda: any(e["step"] == step for e in self.evaluations)):
            return
        settings = self.config.evaluation
        rollouts = self._sample(prompts, settings.rollouts_per_problem, settings.temperature, step)
        if self.engine.is_first_rank:
            result = summarize_rollouts(rollouts)
            self.evaluations.append(result | {"step": step})
            self.log.evaluation(step, result)

    def report(self, step: int, rollouts: list[Rollout], metrics: dict[str, float]) -> None:
        """Step `step` (from 1) into the log and, where asked for, its rollouts into a file."""
        self.unreported = None

        def write() -> None:
            if "time/step" in metrics:
                metrics["perf/tokens_per_second"] = metrics["batch/tokens"] / metrics["time/step"]
            behind = [(step - 1 - version, tokens) for r in rollouts for version, tokens in r.versions]
            metrics["rollout/staleness"] = sum(updates * tokens for updates, tokens in behind) / metrics["batch/tokens"]
            metrics["rollout/staleness/max"] = max(updates for updates, _ in behind)
            self.log.step({"step": step, "rollout/restarts": self._restarts()} | metrics)
            if self.config.dump_rollouts:
                save_rollouts(rollouts, self.output / "rollouts" / f"step_{step:06d}.jsonl")

        on_first_rank(write)

    def _restarts(self) -> int:
        return self.servers.restarts

    def finish(self) -> None:
        """The final Hugging Face checkpoint, the table and the plot."""
        self.turns.training()
        model, target = self.config.model.path, self.output / "hf"
        on_first_rank_while(lambda weights: save_hf(weights, model, target), self.engine.export_weights())
        if self.engine.is_first_rank:
            self.log.message(f"model {target}")
            if self.evaluations:
                plot_frontier(self.evaluations, self.output / "frontier.png")
                self.log.message(f"plot  {self.output / 'frontier.png'}")
                if len(self.evaluations) > 1:
                    self.log.message(summary_table(self.evaluations[0], self.evaluations[-1]))


class Replay(FirstRank):
    """Trains on dumped rollouts, without SGLang: `debug: train-only`."""

    def _start_servers(self) -> None:
        self.turns = Apart(None)
        if self.engine.is_first_rank:
            print(f"rollouts: replayed from {self.config.replay}, without SGLang", flush=True)

    def push_weights(self, version: int) -> None:
        """There is no SGLang."""

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        path = Path(self.config.replay)
        path = path / f"step_{step + 1:06d}.jsonl" if path.is_dir() else path
        rollouts = on_first_rank(
            lambda: load_replay(
                path, self.config, self.engine.arch.vocab_size, privileged=needs_teacher(self.config.objective)
            )
        )
        return Batch(rollouts, len(rollouts))

    def sample_ahead(self, prompts: list[Prompt], step: int) -> None:
        """There is nobody to sample."""

    def await_sampling(self) -> None:
        """There is nobody to sample."""

    def evaluate(self, prompts: list[Prompt], step: int) -> None:
        """There is nobody to sample."""

    def _restarts(self) -> int:
        return 0
