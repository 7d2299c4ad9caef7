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
    prompts = build_prompts(source, builder, bad, privileged=privileged, solutions=solutions)
    tell_left_out(source, len(prompts), bad)
    return prompts


def build_prompts(
    source: str, builder: PromptBuilder, bad: BadRows, *, privileged: bool, solutions: Solutions | None
) -> list[Prompt]:
    """Return the prompts of the rows that can be used, as `load_prompts` does; the other rows go to `bad`."""

    def build(problem: Problem) -> Prompt:
        prompt = builder.build(problem, privileged=privileged)
        if solutions is not None:
            solutions.response_ids(problem)
        return prompt

    return usable(load_problems(source, builder.config, privileged=privileged, bad=bad), build, bad)


def usable(problems: Iterable[Problem], build: Callable[[Problem], T], bad: BadRows) -> list[T]:
    """Return what `build` makes of each problem; those that cannot be used go to `bad`, which may raise BadArgument."""
    built = []
    for problem in problems:
        try:
            built.append(build(problem))
        except BadRow as error:
            bad.add(error)
    return built


def tell_left_out(source: str, count: int, bad: BadRows) -> None:
    """Print on rank 0 which rows of `source` are in `bad`, beside `count` others; BadArgument if there is no other."""
    if not count:
        raise BadArgument(f"{source} holds no problem that can be used, but {bad}")
    if bad.places and torchrun.rank() == 0:
        print(f"{source}: {count} problems; left out are {bad}", flush=True)
