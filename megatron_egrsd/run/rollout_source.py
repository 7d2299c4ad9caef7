"""The source of a step's rollouts: SGLang servers, or what needs none (offline_rollouts.py)."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import Place
from megatron_egrsd.data.samples import Prompt, Rollout
from megatron_egrsd.data.stopping import stop_token_ids
from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import RunError
from megatron_egrsd.fleet.colocation import Colocated, Placement, Separate
from megatron_egrsd.fleet.fleet import Fleet
from megatron_egrsd.objectives.load import needs_rollouts
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import ServersLost, retry_lost
from megatron_egrsd.run.offline_rollouts import OfflineRollouts, replayed_batches, solution_batches
from megatron_egrsd.run.preemption import Preemption
from megatron_egrsd.run.stopwatch import Stopwatch
from megatron_egrsd.sampling.batches import Batch, Batches, check_versions
from megatron_egrsd.sampling.partial_batches import PartialBatches
from megatron_egrsd.sampling.sampler import Sampler, training_sampler

T = TypeVar("T")


class RolloutSource(Protocol):
    """Source of the batches that a run trains on. Every rank makes the same calls; rollouts and errors reach all ranks.

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
        """Send the engine's weights as `version` to the servers, if there are any.

        Adds the seconds to `watch`: "time/sync", and with servers "time/wait".
        """


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
        self.executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sample-ahead"))
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
            self.batches = PartialBatches(self.sampler, self.executor, rollout, config.steps, config.seed, self.begin)
        else:
            self.batches = Batches(self.sampler, self.executor, rollout, config.objective, config.seed, self.begin)

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


def rollout_source(config: Config, engine: Engine, tokenizer, preemption: Preemption, seed: int, begin: Place,
                   stack: contextlib.ExitStack) -> RolloutSource:  # fmt: skip
    """Make the source that `config` names; `LiveRollouts` has the arguments."""
    if config.debug == "train-only":
        return OfflineRollouts(replayed_batches(config, engine, begin))
    if not needs_rollouts(config.objective):
        return OfflineRollouts(solution_batches(config, engine, begin))
    return LiveRollouts(config, engine, tokenizer, preemption, seed, begin, stack)
