"""The teacher's context "majority": the answer that most rollouts of a prompt agree on, once they are all there."""

from dataclasses import replace

from megatron_egrsd.data.contexts import fill
from megatron_egrsd.data.problems import BadRow
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Rollout
from megatron_egrsd.rewards.vote import majority_answer


class MajorityContexts:
    """The context of each rollout of a batch, which tells its group's answer.

    Every rollout that was not cut off votes, the one that is scored too (as in TTRL): if it did not, each half of a
    group that is split in two would be told the answer of the other half.
    """

    def __init__(self, builder: PromptBuilder):
        self.builder = builder

    def __call__(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts, whole groups in any order, with one context each; [] if their group agrees on none."""
        groups: dict[int, list[Rollout]] = {}
        for rollout in rollouts:
            groups.setdefault(rollout.group, []).append(rollout)
        contexts = {group: self._contexts(members) for group, members in groups.items()}
        return [replace(rollout, contexts=contexts[rollout.group]) for rollout in rollouts]

    def _contexts(self, group: list[Rollout]) -> list[list[int]]:
        builder = self.builder
        answer = majority_answer([builder.opened + r.text for r in group if r.finish_reason == "stop"])
        if not answer:
            return []
        told = replace(group[0].prompt.problem, answer=answer, solution="", teacher_turns=[])
        turns = builder.context(told, fill(builder.config.student_template, told))
        try:
            return [builder.teacher_ids(told, turns)]
        except BadRow:  # the answer is too long, or holds special tokens
            return []
