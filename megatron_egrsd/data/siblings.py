"""Teacher contexts that quote the rollouts of the same prompt: built after sampling, when a whole group is there.

The response of a sibling takes the place of {solution} in data.teacher_template, its last box that of {answer}.
Truncated siblings are not quoted, nor those that the prompt has no room for or that hold special tokens.
"""

from collections.abc import Callable
from dataclasses import replace

from megatron_egrsd.data.boxes import boxes
from megatron_egrsd.data.contexts import fill
from megatron_egrsd.data.problems import BadRow
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Rollout

# (right siblings, wrong ones: numbers of rollouts that can be quoted) -> those that the teacher reads, a context each
Choice = Callable[[list[int], list[int]], list[int]]


class SiblingContexts:
    """The `contexts` of the rollouts of a batch, as `data.teacher_context` says."""

    def __init__(self, builder: PromptBuilder):
        self.builder, most = builder, builder.config.wrong_siblings
        choices: dict[str, Choice] = {
            "sibling": lambda right, wrong: right[:1],
            # RLCSD (arXiv 2606.11709): one right sibling, and wrong ones; without either there is no contrast.
            "contrast": lambda right, wrong: right[:1] + wrong[:most] if right and wrong else [],
        }
        self.quoted = choices[builder.config.teacher_context]

    def __call__(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts, whole groups in any order, with their contexts.

        A rollout never reads itself. Its siblings are taken from the place behind it on, round the group, so that each
        is quoted about as often (ours; the authors of RLCSD draw them at random).
        """
        groups: dict[int, list[int]] = {}
        for number, rollout in enumerate(rollouts):
            groups.setdefault(rollout.group, []).append(number)
        result = list(rollouts)
        for members in groups.values():
            prompts = {number: self._prompt(rollouts[number]) for number in members}
            for place, number in enumerate(members):
                others = [i for i in members[place + 1 :] + members[:place] if prompts[i] is not None]
                right = [i for i in others if rollouts[i].right]
                wrong = [i for i in others if not rollouts[i].right]
                contexts = [prompts[i] or [] for i in self.quoted(right, wrong)]
                result[number] = replace(rollouts[number], contexts=contexts)
        return result

    def _prompt(self, sibling: Rollout) -> list[int] | None:
        """Return the teacher's prompt that quotes `sibling`, or None if it cannot be quoted."""
        if sibling.finish_reason != "stop" or not sibling.text.strip():
            return None
        found = boxes(sibling.text)
        problem = sibling.prompt.problem
        answer = found[-1].content if found else problem.answer if sibling.right else ""
        told = replace(problem, solution=sibling.text, answer=answer, teacher_turns=[])
        if not answer and "{answer}" in str(self.builder.config.teacher_template):
            return None
        try:
            return self.builder.teacher_ids(told, fill(self.builder.config.teacher_template, told))
        except BadRow:
            return None
