"""Partial rollouts: responses go on while the weights change (docs/guides/overlap.md).

`prompts_per_step + extra_prompts` groups are outstanding at any time. A step takes complete groups, the oldest first,
and waits for every group that would be too old in the next step: no response is thrown away, and the bound is exact.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

from megatron_egrsd.config import RolloutConfig
from megatron_egrsd.data.problems import Place, problem_indices
from megatron_egrsd.data.samples import Prompt, Rollout
from megatron_egrsd.errors import Preempted
from megatron_egrsd.rollout.generation import NOTHING, Generation
from megatron_egrsd.rollout.partial import SamplingPhase
from megatron_egrsd.rollout.servers import ServersLost
from megatron_egrsd.sampling.batches import Batch
from megatron_egrsd.sampling.sampler import Sampler


@dataclass(eq=False)
class Group:
    """The responses to one prompt, and their rollouts once all are finished and rewarded."""

    prompt: Prompt
    responses: list[Generation]
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def oldest(self) -> float:
        """The version of the oldest token that has come back; infinity if none has."""
        return min((r.weight_version for r in self.responses if r.segments), default=float("inf"))


def complete_batch(groups: list[Group], step: int, size: int, staleness: int) -> list[Group]:
    """Return the batch of `step` (from 0) out of the outstanding groups, in their order; [] while it has to wait.

    Tokens that have not come back yet are sampled by version `step`, too new to matter here. Groups that would be too
    old in the next step always fit into the batch: one batch after the newest of them began, all but `extra_prompts`
    of the outstanding groups were taken, which config/rollout.py keeps within `size`, and at 0 if staleness is 1.
    """
    complete = sorted((g for g in groups if g.rollouts), key=lambda g: g.oldest)[:size]
    too_old_next = [g for g in groups if g.oldest < step + 1 - staleness]
    ready = len(complete) == size and all(g in complete for g in too_old_next)
    return [g for g in groups if g in complete] if ready else []


class PartialBatches:
    """The batches of a run of `steps` steps whose sampling stops only for new weights; used like batches.Batches.

    The problems that are drawn follow from the seed, and from the place at which a run begins or resumes.
    """

    def __init__(self, sampler: Sampler, thread: ThreadPoolExecutor, config: RolloutConfig, steps: int, seed: int,
                 begin: Place):  # fmt: skip
        self.sampler, self.thread, self.config, self.steps, self.seed = sampler, thread, config, steps, seed
        self.begin = begin
        self.groups: list[Group] = []  # outstanding, in the order of their problems
        self.drawn = begin.problems  # number of problems drawn from the endless order, trained ones included
        self.phase: SamplingPhase | None = None
        self.seconds, self.since = 0.0, 0.0
        self.changed = threading.Condition()  # a group is complete, or the phase has ended

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        """Return the batch of `step`, or raise the error of its sampling; after ServersLost, call again to go on."""
        self.ahead(prompts, step)
        if self.phase is None:
            self._start()
        with self.changed:
            self.changed.wait_for(lambda: self._complete_batch(step) or self.phase.future.done())
            chosen = self._complete_batch(step)
        self._count_seconds()
        if not chosen:
            phase, self.phase = self.phase, None
            phase.stop()  # raises
        self.groups = [group for group in self.groups if group not in chosen]
        rollouts = [replace(r, group=i) for i, group in enumerate(chosen) for r in group.rollouts]
        seconds, self.seconds = self.seconds, 0.0
        return Batch(rollouts, len(rollouts), seconds)

    def ahead(self, prompts: list[Prompt], step: int) -> None:
        """Draw problems until as many groups are outstanding as may be, or every step of the run has its problems."""
        settings = self.config
        most = settings.prompts_per_step + settings.extra_prompts
        last = self.begin.after(self.steps, settings.prompts_per_step)
        while len(self.groups) < most and self.drawn < last:
            [index] = problem_indices(len(prompts), self.drawn, 1, self.seed)
            self.groups.append(Group(prompts[index], [NOTHING] * settings.rollouts_per_prompt))
            self.drawn += 1
            if self.phase is not None:
                self._add(self.groups[-1])

    def wait(self) -> None:
        """Stop the requests in flight; re-raise errors that `batch` could not recover from, except Preempted."""
        if self.phase is not None:
            phase, self.phase = self.phase, None
            with suppress(ServersLost, Preempted):
                phase.stop()
            self._count_seconds()

    def _complete_batch(self, step: int) -> list[Group]:
        return complete_batch(self.groups, step, self.config.prompts_per_step, self.config.staleness)

    def _start(self) -> None:
        self.since = time.perf_counter()
        self.phase = SamplingPhase(self.sampler.client, self.thread)
        self.phase.future.add_done_callback(lambda _: self._notify())
        for group in self.groups:
            if not group.rollouts:
                self._add(group)

    def _add(self, group: Group) -> None:
        self.phase.add(group.prompt.student_ids, group.responses, lambda: self._reward(group))

    def _reward(self, group: Group) -> None:
        group.rollouts = self.sampler.rewarded(group.prompt, group.responses)
        self._notify()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
