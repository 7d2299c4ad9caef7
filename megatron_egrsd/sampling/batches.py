"""The batch of a step: draw prompts, sample and refill groups, when the batch is needed or ahead of it in a thread."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_egrsd.config import ObjectiveConfig, RolloutConfig
from megatron_egrsd.data.problems import Place, batch_indices, problem_indices
from megatron_egrsd.data.samples import Prompt, Rollout
from megatron_egrsd.errors import Preempted, RunError
from megatron_egrsd.objectives.interface import Objective, rollout_advantages
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.rollout.servers import ServersLost
from megatron_egrsd.sampling.sampler import Sampler

# (prompts, their finished responses as in RolloutClient.generate) -> rewarded rollouts of the prompts
SampleGroups = Callable[[list[Prompt], dict], list[Rollout]]


@dataclass(frozen=True)
class Batch:
    """The rollouts that a step trains, the number sampled for them, and the seconds of sampling and rewarding."""

    rollouts: list[Rollout]
    sampled: int
    seconds: float = 0.0


class BatchSampling:
    """The sampling of the batch of step `step` (from 0), on one process.

    Dynamic sampling: groups without a signal are replaced by groups of fresh prompts, `rollout.dynamic_sampling` times
    at most. The prompts follow from seed, step, round and the `begin` of the run: a resumed run draws the same.
    """

    def __init__(self, sample_groups: SampleGroups, prompts: list[Prompt], config: RolloutConfig,
                 objective: ObjectiveConfig, seed: int, step: int, begin: Place):  # fmt: skip
        self.sample_groups, self.prompts, self.config, self.objective = sample_groups, prompts, config, objective
        self.seed, self.step, self.begin = seed, step, begin
        self.rollouts: list[Rollout] = []
        self.rounds, self.sampled, self.seconds = 0, 0, 0.0
        self.done: dict = {}  # of the present round
        self.future: Future | None = None

    def start(self, thread: ThreadPoolExecutor) -> None:
        """Begin to sample in `thread`; return at once."""
        self.future = thread.submit(self._run)

    def wait(self) -> None:
        """Block until sampling has stopped; re-raise errors that `result` could not recover from, except Preempted.

        After ServersLost `result` samples the rest.
        """
        error = self.future.exception() if self.future is not None else None
        if isinstance(error, ServersLost):
            self.future = None  # or `result` would raise it again, after the servers have been recovered
        elif error is not None and not isinstance(error, Preempted):
            raise error

    def result(self) -> Batch:
        """Return the batch, or raise the error of its sampling; after ServersLost, call again to sample the rest."""
        future, self.future = self.future, None
        return future.result() if future is not None else self._run()

    def _run(self) -> Batch:
        started = time.perf_counter()
        try:
            while groups := self._groups():
                rollouts = self.sample_groups(self._prompts(groups), self.done)
                kept = [r for r in self.rollouts if r.group not in groups]
                fresh = [replace(r, group=groups[r.group]) for r in rollouts]
                self.rollouts = sorted(kept + fresh, key=lambda r: r.group)
                self.rounds, self.sampled, self.done = self.rounds + 1, self.sampled + len(rollouts), {}
        finally:
            self.seconds += time.perf_counter() - started
        return Batch(self.rollouts, self.sampled, self.seconds)

    def _groups(self) -> list[int]:
        """Return the groups to sample next: all, then groups without a signal while there are rounds left."""
        if not self.rounds:
            return list(range(self.config.prompts_per_step))
        if self.rounds > self.config.dynamic_sampling:
            return []
        return groups_without_signal(self.rollouts, load_objective(self.objective), self.config.max_response_tokens)

    def _prompts(self, groups: list[int]) -> list[Prompt]:
        size, number = self.config.prompts_per_step, len(self.prompts)
        if self.rounds:
            refill = self.step * self.config.dynamic_sampling + self.rounds - 1
            indices = batch_indices(number, size, refill, f"{self.seed}/refill")
        else:
            indices = problem_indices(number, self.begin.after(self.step, size), size, self.seed)
        return [self.prompts[i] for i in indices[: len(groups)]]


class Batches:
    """The batches of a run, each sampled by one version of the weights; on one process."""

    def __init__(self, sampler: Sampler, thread: ThreadPoolExecutor, config: RolloutConfig, objective: ObjectiveConfig,
                 seed: int, begin: Place):  # fmt: skip
        self.sampler, self.thread, self.config, self.objective = sampler, thread, config, objective
        self.seed, self.begin = seed, begin
        self.sampling: BatchSampling | None = None

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        """Return the batch of `step` (from 0), sampled ahead or now, as BatchSampling.result."""
        if self.sampling is None:
            self.sampling = self._sampling_of(prompts, step)
        batch, self.sampling = self.sampling.result(), None
        return batch

    def ahead(self, prompts: list[Prompt], step: int) -> None:
        """Begin to sample the batch of `step` with the weights that SGLang holds; return at once."""
        self.sampling = self._sampling_of(prompts, step)
        self.sampling.start(self.thread)

    def wait(self) -> None:
        """Block until no request is in flight, as BatchSampling.wait."""
        if self.sampling is not None:
            self.sampling.wait()

    def _sampling_of(self, prompts: list[Prompt], step: int) -> BatchSampling:
        def sample_groups(some: list[Prompt], done: dict) -> list[Rollout]:
            rollouts = self.sampler.sample(some, self.config.rollouts_per_prompt, self.config, done)
            return self.sampler.contexts(rollouts)

        return BatchSampling(sample_groups, prompts, self.config, self.objective, self.seed, step, self.begin)


def groups_without_signal(rollouts: list[Rollout], objective: Objective, max_response_tokens: int) -> list[int]:
    """Return the groups whose rollouts all have advantage 0 (all right or all wrong, under the group advantage)."""
    _, advantage = rollout_advantages(rollouts, objective, max_response_tokens)
    signal = {r.group for r, a in zip(rollouts, advantage, strict=True) if a}
    return sorted({r.group for r in rollouts} - signal)


def check_versions(rollouts: list[Rollout], step: int, staleness: int) -> None:
    """Raise RunError unless every token was sampled by the weights after `step` to `step - staleness` updates."""
    oldest = max(0, step - staleness)
    if wrong := {version for r in rollouts for version, _ in r.versions} - set(range(oldest, step + 1)):
        allowed = f"; rollout.staleness = {staleness} allows versions from {oldest} on" if staleness else ""
        raise RunError(f"SGLang sampled with weight version {min(wrong)}, but the engine holds version {step}{allowed}")
