"""The source of a step's rollouts: SGLang servers, the dumps of another run (`debug: train-only`), or solutions."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import Place, problem_indices
from megatron_egrsd.data.prompt_builder import prompt_builder
from megatron_egrsd.data.samples import Prompt, Rollout, load_rollouts
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.data.stopping import stop_token_ids
from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.fleet.colocation import Colocated, Placement, Separate
from megatron_egrsd.fleet.fleet import Fleet
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.objectives.load import load_objective, needs_rollouts, needs_teacher
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import ServersLost, retry_lost
from megatron_egrsd.run.preemption import Preemption
from megatron_egrsd.run.stopwatch import Stopwatch
from megatron_egrsd.sampling.batches import Batch, Batches, check_versions
from megatron_egrsd.sampling.partial_batches import PartialBatches
from megatron_egrsd.sampling.sampler import Sampler, training_sampler

T = TypeVar("T")


class RolloutSource(Protocol):
    """Gives the batches that a run trains on. Every rank makes the same calls; rollouts and errors reach all ranks.

    Attributes:
        placement: Enter its phase "training" before the engine trains, loads, saves or exports.
    """

    placement: Placement

    @property
    def restarts(self) -> int:
        """Losses of servers so far; known on rank 0."""

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        """Return the batch of `step` (from 0), and begin the sampling that the next step needs."""

    def evaluation(self, prompts: list[Prompt], step: int) -> list[Rollout]:
        """Return k rollouts of each held-out prompt with the weights after `step` updates; [] if none can be had."""

    def push_weights(self, version: int, watch: Stopwatch) -> None:
        """Sample with the engine's weights from now on. Takes "time/wait" and "time/sync"."""


class LiveRollouts:
    """Rollouts sampled by SGLang, which gets the engine's weights after every update.

    `preemption` ends the sampling of requests in flight. `seed` is the servers'. The problems begin at `begin`. `stack`
    ends requests, servers and thread, in this order.
    """

    def __init__(self, config: Config, engine: Engine, tokenizer, preemption: Preemption, seed: int,
                 begin: Place, stack: contextlib.ExitStack):  # fmt: skip
        self.begin = begin
        self.config, self.engine, self.tokenizer, self.preemption = config, engine, tokenizer, preemption
        self.ending = False
        rollout, output = config.rollout, Path(config.output)
        self.fleet = Fleet(rollout, config.model, engine, output, config.parallel.timeout)
        self.placement: Placement = (Colocated if rollout.servers.colocated else Separate)(self.fleet)
        if engine.is_first_rank:
            on_nodes = f" on each of {nodes} nodes" if (nodes := len(self.fleet.nodes)) > 1 else ""
            launched = f"{rollout.servers.engines} SGLang server(s){on_nodes}, log in {output / 'logs'}"
            print(f"rollouts: {', '.join(rollout.servers.urls) or launched}; starting takes up to a minute", flush=True)
        # The thread outlives the servers: a server that it starts again would die with it (rollout/launch_guard.py).
        self.thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sample-ahead"))
        stack.callback(self.fleet.close)
        self.fleet.start(seed)
        self.sampler: Sampler | None = None  # these two on rank 0 only
        self.batches: Batches | PartialBatches | None = None
        on_first_rank(self._prepare_sampling)
        stack.callback(self._end_sampling)

    def _prepare_sampling(self) -> None:
        config, rollout = self.config, self.config.rollout
        stop = stop_token_ids(self.tokenizer, config.data, rollout.stop_tokens)
        client = RolloutClient(self.fleet.servers, rollout, stop, self._check)
        self.sampler = training_sampler(config, client, self.tokenizer)
        if rollout.partial:
            self.batches = PartialBatches(self.sampler, self.thread, rollout, config.steps, config.seed, self.begin)
        else:
            self.batches = Batches(self.sampler, self.thread, rollout, config.objective, config.seed, self.begin)

    def _check(self) -> None:
        """Raise if the sampling shall end; called while requests are in flight."""
        self.preemption.check()
        if self.ending:
            raise RunError("the run has ended")

    def _end_sampling(self) -> None:
        self.ending = True
        if self.batches is not None:
            with contextlib.suppress(Exception):
                self.batches.wait()

    @property
    def restarts(self) -> int:
        return self.fleet.servers.restarts

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        """Return the batch of `step`, sampled ahead or now; under `rollout.staleness`, begin to sample the next one.

        Servers that die meanwhile are replaced; rollouts that are missing then are sampled with the weights of `step`.
        """
        staleness = self.config.rollout.staleness
        batch = self._with_servers(lambda: self.batches.batch(prompts, step), step)
        check_versions(batch.rollouts, step, staleness)
        self.placement.enter("training")
        if staleness and self.engine.is_first_rank and step + 1 < self.config.steps:
            self.batches.ahead(prompts, step + 1)
        return batch

    def evaluation(self, prompts: list[Prompt], step: int) -> list[Rollout]:
        settings, done = self.config.evaluation, {}  # finished rollouts outlive the servers that sampled them
        return self._with_servers(
            lambda: self.sampler.sample(prompts, settings.rollouts_per_problem, settings, done), step
        )

    def _with_servers(self, sample: Callable[[], T], version: int) -> T:
        """Return `sample()` of rank 0, from servers that hold the weights of `version`."""
        if self.placement.phase == "training":  # the servers gave up their weights, for a checkpoint
            self._push(version)
        # Servers that start again need the weights, and every rank has a part of them.
        return retry_lost(lambda: on_first_rank(sample), lambda _: self._push(version))

    def push_weights(self, version: int, watch: Stopwatch) -> None:
        """Stop sampling, then send the engine's weights; every rank streams its part.

        Raises RunError if the next batch cannot be sampled, or if weights did not arrive. Errors of sampling that
        `batch` can recover from, and those that end the run anyway, wait for `batch`.
        """
        with watch("time/wait"):
            if self.config.rollout.staleness:  # weights never change under a request
                on_first_rank(lambda: self.batches.wait())
        with watch("time/sync"):
            self._push(version)

    def _push(self, version: int) -> None:
        def send() -> None:
            self.placement.enter("transfer")
            self.fleet.push(version)
            self.placement.enter("sampling")

        def recover(lost: ServersLost) -> None:
            self.fleet.mark_lost(str(lost))
            self.placement.enter("recovery")
            if self.engine.is_first_rank:
                print(f"the weights did not arrive: {lost}; sending them again", flush=True)

        retry_lost(send, recover)


class _WithoutServers:
    """Stand in for servers: nothing to evaluate with, and nobody who takes weights."""

    def __init__(self) -> None:
        self.placement: Placement = Separate(None)
        self.restarts = 0

    def evaluation(self, prompts: list[Prompt], step: int) -> list[Rollout]:
        return []

    def push_weights(self, version: int, watch: Stopwatch) -> None:
        watch.seconds["time/sync"] = 0.0


class SolutionRollouts(_WithoutServers):
    """Reference solutions in place of rollouts, in the order of the problems. The problems begin at `begin`."""

    def __init__(self, config: Config, engine: Engine, begin: Place):
        super().__init__()
        self.config, self.begin = config, begin
        self.solutions = Solutions(prompt_builder(config), config)
        if engine.is_first_rank:
            left_out = "; held-out problems are not evaluated" if config.data.evaluation else ""
            print(f"rollouts: none, the reference solutions are trained, without SGLang{left_out}", flush=True)

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        size, seed = self.config.rollout.prompts_per_step, self.config.seed
        chosen = problem_indices(len(prompts), self.begin.after(step, size), size, seed)
        rollouts = [self.solutions.rollout(prompts[i], group, step) for group, i in enumerate(chosen)]
        return Batch(rollouts, 0)


class ReplayedRollouts(_WithoutServers):
    """Rollouts of `config.replay`: one file for every step, or a directory with a file for each. No SGLang runs.

    Raises BadArgument if a step from `begin` on has no file.
    """

    def __init__(self, config: Config, engine: Engine, begin: Place):
        super().__init__()
        self.config, self.arch = config, engine.arch
        on_first_rank(lambda: check_replay(config, begin.step))
        if engine.is_first_rank:
            print(f"rollouts: replayed from {config.replay}, without SGLang", flush=True)

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        rollouts = on_first_rank(lambda: load_replay(_dump(self.config, step), self.config, self.arch))
        return Batch(rollouts, len(rollouts))


def rollout_source(config: Config, engine: Engine, tokenizer, preemption: Preemption, seed: int, begin: Place,
                   stack: contextlib.ExitStack) -> RolloutSource:  # fmt: skip
    """Make the source that `config` names; `LiveRollouts` has the arguments."""
    if config.debug == "train-only":
        return ReplayedRollouts(config, engine, begin)
    if not needs_rollouts(config.objective):
        return SolutionRollouts(config, engine, begin)
    return LiveRollouts(config, engine, tokenizer, preemption, seed, begin, stack)


def _dump(config: Config, step: int) -> Path:
    """Return the file of `step` (from 0)."""
    path = Path(config.replay)
    return path / f"step_{step + 1:06d}.jsonl" if path.is_dir() else path


def check_replay(config: Config, begin: int) -> None:
    """Raise BadArgument unless every step from `begin` (from 0) on has a file."""
    for step in range(begin, config.steps):
        if not (path := _dump(config, step)).is_file():
            raise BadArgument(
                f"replay = {config.replay} has no {path.name}, but the run has {config.steps} steps; lower steps"
            )


def load_replay(path: Path, config: Config, arch: Architecture) -> list[Rollout]:
    """Load rollouts that a model of `arch` can train on as one batch.

    Raises BadArgument if they do not fit the batch, the vocabulary, the objective or, to be replayed, the experts.
    """
    rollouts = load_rollouts(path)
    prompts, n = config.rollout.prompts_per_step, config.rollout.rollouts_per_prompt
    groups = Counter(r.group for r in rollouts)
    if groups != Counter({group: n for group in range(prompts)}):
        raise BadArgument(
            f"{path} holds {len(rollouts)} rollouts in {len(groups)} groups, but rollout.prompts_per_step x "
            f"rollout.rollouts_per_prompt = {prompts} x {n} are needed, in groups 0 to {prompts - 1}"
        )
    privileged = needs_teacher(config.objective)
    siblings, several = privileged and config.data.reads_siblings, load_objective(config.objective).needs_contexts
    if not siblings:  # of a run whose teacher read rollouts
        rollouts = [replace(r, contexts=None) for r in rollouts]
    for number, r in enumerate(rollouts, 1):
        ids = itertools.chain(r.prompt.student_ids, r.prompt.teacher_ids, r.response_ids, *(r.contexts or []))
        if max(ids) >= arch.vocab_size:
            raise BadArgument(f"{path}, line {number}: a token beyond the model's vocabulary of {arch.vocab_size}")
        if siblings and (r.contexts is None or (several and len(r.contexts) == 1)):
            raise BadArgument(f"{path}, line {number}: no contexts as data.teacher_context makes them")
        if config.rollout.routing_replay and not _routes_fit(r, arch):
            raise BadArgument(f"{path}, line {number}: no routes of this model, which rollout.routing_replay needs")
        if privileged and not siblings and not r.prompt.teacher_ids:
            raise BadArgument(f"{path}, line {number}: no teacher prompt, which this objective needs")
    return rollouts


def _routes_fit(rollout: Rollout, arch: Architecture) -> bool:
    """Return whether the rollout's routes are experts of `arch`, in each layer, of all tokens but the last."""
    whole = len(rollout.routes) == rollout.routed_tokens * arch.num_layers * arch.experts_per_token
    return whole and max(rollout.routes) < arch.num_experts
