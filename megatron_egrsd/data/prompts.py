"""Load the prompts of a file of problems."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from megatron_egrsd.data.problems import BadRow, BadRows, load_problems
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Problem, Prompt
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.system import torchrun

T = TypeVar("T")


def load_prompts(
    source: str, builder: PromptBuilder, *, privileged: bool, solutions: Solutions | None = None
) -> list[Prompt]:
    """Load the prompts of a file of problems; rank 0 prints the rows that were left out (`data.bad_rows` "skip").

    With `solutions` each row needs one that can be trained.

    Raises BadArgument, naming file and line, for a row that `data.bad_rows` refuses, or if no problem is left.
    """
    bad = BadRows(builder.config.bad_rows)

    def build(problem: Problem) -> Prompt:
        prompt = builder.build(problem, privileged=privileged)
        if solutions is not None:
            solutions.response_ids(problem)
        return prompt

    return usable(source, load_problems(source, builder.config, privileged=privileged, bad=bad), build, bad)


def usable(source: str, problems: Iterable[Problem], build: Callable[[Problem], T], bad: BadRows) -> list[T]:
    """Return what `build` makes of each problem of `source`; rank 0 prints the rows in `bad`, to which it adds.

    Raises BadArgument for a problem that `bad` refuses, or if none is left.
    """
    built = []
    for problem in problems:
        try:
            built.append(build(problem))
        except BadRow as error:
            bad.add(error)
    if not built:
        raise BadArgument(f"{source} holds no problem that can be used, but {bad}")
    if bad.places and torchrun.rank() == 0:
        print(f"{source}: {len(built)} problems; left out are {bad}", flush=True)
    return built
