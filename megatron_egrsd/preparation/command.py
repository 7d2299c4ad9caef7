"""Turn a training set into this project's schema, without the problems that the evaluation sets contain.

    megatron-egrsd prepare-data deepmath/*.parquet --evaluation aime24.jsonl --evaluation amc23.jsonl -o train.jsonl
    megatron-egrsd prepare-data open-thoughts/OpenThoughts-114k:metadata:train --evaluation aime24.jsonl -o train.jsonl

Reads DAPO-Math, OpenThoughts, Openthoughts_math_30k_opsd (the EGRSD paper's set), DeepMath, and rows that hold problem
and answer already, from .jsonl and .parquet files or the hub ("name[:config]:split"). Writes one JSON object a line:
id, problem, answer, solution (docs/guides/data.md).
"""

import json
from collections import Counter
from pathlib import Path

from megatron_egrsd.data.samples import Problem
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.preparation.contamination import Contamination, words
from megatron_egrsd.preparation.readers import read_problems
from megatron_egrsd.rewards.normal_form import normalize
from megatron_egrsd.system.arguments import Parser, path
from megatron_egrsd.system.files import atomic

_FIELDS = ("id", "problem", "answer", "solution")
_SHOWN = 5  # contaminated rows that the report names


def main(arguments: list[str]) -> None:
    """Prepare a data set as the `arguments` behind `megatron-egrsd prepare-data` say.

    Raises BadArgument for a request that cannot work, RunError if the output cannot be written.
    """
    parser = Parser(prog="megatron-egrsd prepare-data", description=__doc__)
    parser.add_argument("sources", nargs="+", help=".jsonl or .parquet files, or hub datasets name[:config]:split")
    parser.add_argument("--evaluation", action="append", default=[], help="an evaluation set; may be repeated")
    parser.add_argument("-o", "--output", type=path, required=True, help="the .jsonl file to write; must not exist")
    parser.add_argument(
        "--max-characters",
        type=int,
        default=8000,
        help="drop rows whose problem and solution are longer together: the teacher reads both (8000)",
    )
    options = parser.parse_args(arguments)
    try:
        prepare(options.sources, options.evaluation, options.output, options.max_characters)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None


def prepare(sources: list[str], evaluation: list[str], output: Path, max_characters: int) -> None:
    """Write the usable rows of `sources` to `output`, all of them or nothing, and print what became of every row."""
    if output.exists():
        raise BadArgument(f"{output} exists; remove it or choose another --output")
    contamination = Contamination(evaluation)
    counts, hits, seen, without_solution = Counter(), [], _Seen(), 0
    with atomic(output) as partial:
        with partial.open("w", encoding="utf-8") as file:
            for source in sources:
                for problem in read_problems(source):
                    fate = _fate(problem, contamination, seen, hits, max_characters)
                    counts[fate] += 1
                    if fate == "written":
                        without_solution += not problem.solution
                        row = {key: getattr(problem, key) for key in _FIELDS}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not counts["written"]:
            raise BadArgument(f"no row is left: {', '.join(f'{n} {fate}' for fate, n in counts.items()) or 'no rows'}")

    print(f"{counts.total():>9,} rows read")
    for fate, n in sorted(counts.items(), key=lambda item: item[0] == "written"):
        print(f"{n:>9,} {fate}" + (f" to {output}" if fate == "written" else ""))
    for own, other in hits[:_SHOWN]:
        print(f"          contaminated: {own} is like {other}")
    for sentence in seen.contradictions[:_SHOWN]:
        print(f"          contradicting: {sentence}")
    if not evaluation:
        print("no --evaluation was given: nothing was checked for contamination")
    if without_solution:
        print(f"{without_solution:,} rows have no solution: let data.teacher_template use {{answer}} instead")


class _Seen:
    """The problems so far, and the later ones among them that give another answer."""

    def __init__(self):
        self.first: dict[tuple[str, ...], Problem] = {}
        self.contradictions: list[str] = []

    def again(self, text: tuple[str, ...], problem: Problem) -> str:
        """Return the fate of a problem that was there before, else "". The first one is kept in any case."""
        first = self.first.setdefault(text, problem)
        if first is problem:
            return ""
        if normalize(first.answer) == normalize(problem.answer):
            return "duplicates"
        self.contradictions.append(f"{first.id} says {first.answer[:40]}, {problem.id} says {problem.answer[:40]}")
        return "duplicates with another answer than the first, which was kept: look at both"


def _fate(problem: Problem, contamination: Contamination, seen: _Seen, hits: list, max_characters: int) -> str:
    text = words(problem.problem)
    if not text or not problem.answer:
        return "without a problem or a verifiable answer"
    if len(problem.problem) + len(problem.solution) > max_characters:
        return f"longer than {max_characters:,} characters"
    if again := seen.again(text, problem):
        return again
    if other := contamination.find(problem.problem):
        hits.append((problem.id, other))
        return "contaminated"
    return "written"
