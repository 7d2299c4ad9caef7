"""Make what the teacher reads before each response, by the name of the context.

template, answer, concise and sibling are those of `data.teacher_context`. Ours, to tell what a solution says from the
fact that there is one: "other_solution", the template with the solution of another problem; "wrong_sibling", the
template with a wrong response to the same problem (the negative hint of RLCSD, arXiv 2606.11709).
"""

from dataclasses import replace

from megatron_egrsd.config import Config
from megatron_egrsd.data.contexts import fill
from megatron_egrsd.data.problems import BadRow
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Problem, Rollout
from megatron_egrsd.data.siblings import SiblingContexts

CONTEXTS = ("template", "answer", "concise", "sibling", "wrong_sibling", "other_solution")


class TeacherContexts:
    """Builder of the teacher's prompts in the contexts `names`."""

    def __init__(self, tokenizer, config: Config, context_length: int, names: tuple[str, ...]):
        def builder(context: str) -> PromptBuilder:
            data = replace(config.data, teacher_context=context)
            return PromptBuilder(tokenizer, data, config.rollout.max_response_tokens, context_length)

        self.names = names
        self.template = builder("template")
        self.built = {name: builder(name) for name in names if name in ("template", "answer", "concise")}
        self.siblings = {name: SiblingContexts(builder("sibling")) for name in names if name.endswith("sibling")}
        if "wrong_sibling" in self.siblings:
            self.siblings["wrong_sibling"].quoted = lambda right, wrong: wrong[:1]

    def fits(self, problem: Problem) -> bool:
        """Return whether no prompt that can be built before sampling is too long or holds a special token."""
        try:
            self.template.build(problem)
            for builder in self.built.values():
                builder.build(problem)
        except BadRow:
            return False
        return True

    def prompts(self, name: str, rollouts: list[Rollout], others: dict[str, Problem]) -> list[list[int] | None]:
        """Return the teacher's prompt for each rollout in the context `name`; None if it has none.

        `others` holds the problem whose solution "other_solution" tells, by the problem's id.
        """
        if name in self.siblings:
            return [r.contexts[0] if r.contexts else None for r in self.siblings[name](rollouts)]
        problems = {r.prompt.problem.id: r.prompt.problem for r in rollouts}
        if name == "other_solution":
            found = {key: self._told(problem, others[key]) for key, problem in problems.items()}
        else:
            found = {key: self.built[name].build(problem).teacher_ids for key, problem in problems.items()}
        return [found[r.prompt.problem.id] for r in rollouts]

    def _told(self, problem: Problem, other: Problem) -> list[int] | None:
        told = replace(problem, solution=other.solution, answer=other.answer)
        try:
            return self.template.teacher_ids(told, fill(self.template.config.teacher_template, told))
        except BadRow:
            return None
