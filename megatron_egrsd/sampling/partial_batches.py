"""Partial rollouts: responses go on while the weights change (docs/guides/overlap.md).

`prompts_per_step + extra_prompts` groups are outstanding at any time. A step takes those that are complete, the oldest
first, and waits for every group that would be too old in the next one: nothing is thrown away, and the bound is exact.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import batch_indices
from megatron_egrsd.data.samples import Prompt, Rollout
from megatron_egrsd.errors import Preempted
from megatron_egrsd.rollout.generation import NOTHING, Generation
from megatron_egrsd.rollout.partial import Stretch
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
        """The version of the oldest token that has come back; infinity where none has."""
        return min((r.weight_version for r in self.responses if r.segments), default=float("inf"))


def choose(groups: list[Group], step: int, size: int, staleness: int) -> list[Group]:
    """The batch of `step` (from 0) out of the outstanding groups, in their order; empty while it has to wait.

    What has not come back yet is being sampled by version `step`, too new to matter here. Those that would be too old
    in the next step always fit into the batch: one batch after the newest of them began, all but `extra_prompts` of
    the outstanding groups were taken, which config.py keeps within `size`, and at 0 where staleness is 1.
    """
    complete = sorted((g for g in groups if g.rollouts), key=lambda g: g.oldest)[:size]
    too_old_next = [g for g in groups if g.oldest < step + 1 - staleness]
    ready = len(complete) == size and all(g in complete for g in too_old_next)
    return [g for g in groups if g in complete] if ready else []


class Stream:
    """The batches of a run whose sampling is only stopped for new weights; as batches.Batches, on one process.

    Which problems are drawn follows from the seed, and from the step where a run begins or resumes.
    """

    def __init__(self, sampler: Sampler, thread: ThreadPoolExecutor, config: Config):
        self.sampler, self.thread, self.config = sampler, thread, config
        self.groups: list[Group] = []  # outstanding, in the order of their problems
        self.drawn: int | None = None  # problems of the endless order, trained ones included
        self.stretch: Stretch | None = None
        self.seconds, self.since = 0.0, 0.0
        self.changed = threading.Condition()  # a group is complete, or the stretch has ended

    def batch(self, prompts: list[Prompt], step: int) -> Batch:
        """The batch of `step`, or what its sampling met; after ServersLost another call goes on with what there is."""
        self.drawn = step * self.config.rollout.prompts_per_step if self.drawn is None else self.drawn
        self.ahead(prompts, step)
        if self.stretch is None:
            self._start()
        with self.changed:
            self.changed.wait_for(lambda: self._choose(step) or self.stretch.future.done())
            chosen = self._choose(step)
        self._count_seconds()
        if not chosen:
            stretch, self.stretch = self.stretch, None
            stretch.stop()  # raises
        self.groups = [group for group in self.groups if group not in chosen]
        rollouts = [replace(r, group=i) for i, group in enumerate(chosen) for r in group.rollouts]
        seconds, self.seconds = self.seconds, 0.0
        return Batch(rollouts, len(rollouts), seconds)

    def ahead(self, prompts: list[Prompt], step: int) -> None:
        """Draw problems until there are as many groups as there should be, or as the rest of the run trains."""
        settings = self.config.rollout
        while (
            len(self.groups) < settings.prompts_per_step + settings.extra_prompts
            and self.drawn < self.config.steps * settings.prompts_per_step
        ):
            [index] = batch_indices(len(prompts), 1, self.drawn, self.config.seed)
            self.groups.append(Group(prompts[index], [NOTHING] * settings.rollouts_per_prompt))
            self.drawn += 1
            if self.stretch is not None:
                self._add(self.groups[-1])

    def wait(self) -> None:
        """Stop what is in flight. Raises what `batch` cannot mend either, but for Preempted."""
        if self.stretch is not None:
            stretch, self.stretch = self.stretch, None
            with suppress(ServersLost, Preempted):
                stretch.stop()
            self._count_seconds()

    def _choose(self, step: int) -> list[Group]:
        return choose(self.groups, step, self.config.rollout.prompts_per_step, self.config.rollout.staleness)

    def _start(self) -> None:
        self.since = time.perf_counter()
        self.stretch = Stretch(self.sampler.client, self.config.rollout.temperature, self.thread)
        self.stretch.future.add_done_callback(lambda _: self._notify())
        for group in self.groups:
            if not group.rollouts:
                self._add(group)

    def _add(self, group: Group) -> None:
        self.stretch.add(group.prompt.student_ids, group.responses, lambda: self._reward(group))

    def _reward(self, group: Group) -> None:
        group.rollouts = self.sampler.rewarded(group.prompt, group.responses)
        self._notify()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify()

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
