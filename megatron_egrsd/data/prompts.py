"""Load the prompts of a file of problems."""

from megatron_egrsd.data.problems import BadRow, BadRows, load_problems
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Prompt
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.system import torchrun


def load_prompts(
    source: str, builder: PromptBuilder, *, privileged: bool, solutions: Solutions | None = None
) -> list[Prompt]:
    """Load the prompts of a file of problems; rank 0 prints the rows that were left out (`data.bad_rows` "skip").

    With `solutions` each row needs one that can be trained.

    Raises BadArgument, naming file and line, for a row that `data.bad_rows` refuses, or if no problem is left.
    """
    bad, prompts = BadRows(builder.config.bad_rows), []
    for problem in load_problems(source, builder.config, privileged=privileged, bad=bad):
        try:
            prompt = builder.build(problem, privileged=privileged)
            if solutions is not None:
                solutions.response_ids(problem)
            prompts.append(prompt)
        except BadRow as error:
            bad.add(error)
    if not prompts:
        raise BadArgument(f"{source} holds no problem that can be used, but {bad}")
    if bad.places and torchrun.rank() == 0:
        print(f"{source}: {len(prompts)} problems; left out are {bad}", flush=True)
    return prompts
