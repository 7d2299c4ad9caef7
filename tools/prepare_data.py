#!/usr/bin/env python3
"""Turn a training set into this project's schema, without what the evaluation sets contain.

    python tools/prepare_data.py deepmath/*.parquet --evaluation aime24.jsonl --evaluation amc23.jsonl -o train.jsonl
    python tools/prepare_data.py open-thoughts/OpenThoughts-114k:metadata:train --evaluation aime24.jsonl -o train.jsonl

Reads DAPO-Math, OpenThoughts, DeepMath and rows that hold problem and answer already, from .jsonl and .parquet files or
the hub ("name[:config]:split"); writes one JSON object a line: id, problem, answer, solution (docs/guides/data.md).
Exit status: 0 success, 2 a request that cannot work, 130 interrupted, 1 anything else; the reason is one stderr line.
"""

import argparse
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_egrsd.data.problems import read_rows
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.rewards.answers import gold_answer

NGRAM = 13  # words, as in GPT-3's contamination study: shorter runs are often boilerplate
_SHOWN = 5  # contaminated rows that the report names

# -- one reader for each dataset's fields: a row in, (problem, answer, solution) out ---------------------------------


def dapo(row: dict) -> tuple[str, str, str]:
    """DAPO-Math: a chat prompt that wraps the problem in instructions, and an answer. There is no solution."""
    problem = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    if problem.startswith("Solve the following math problem"):
        problem = problem.partition("\n\n")[2]
    return problem.partition("\n\nRemember to put your answer")[0], row["reward_model"]["ground_truth"], ""


def openthoughts(row: dict) -> tuple[str, str, str]:
    """OpenThoughts with metadata: the answer is the box in the published solution, which teaches as well."""
    problem = row["problem"].removeprefix("Return your final response within \\boxed{}.")
    solution = row["ground_truth_solution"] or ""
    is_math = row.get("domain", "math") == "math" and "\\boxed" in solution
    return problem, gold_answer(solution) if is_math else "", solution


def deepmath(row: dict) -> tuple[str, str, str]:
    """DeepMath: the first of three R1 answers is the solution, without its thinking."""
    return row["question"], row["final_answer"], (row.get("r1_solution_1") or "").rpartition("</think>")[2]


def plain(row: dict) -> tuple[str, str, str]:
    """problem or question, answer and solution; a GSM8K answer or a boxed solution holds both."""
    solution = row.get("solution") or ""
    answer = row.get("answer")
    if answer is None:
        answer = gold_answer(solution) if "\\boxed" in solution else ""
    elif isinstance(answer, str) and "####" in answer:
        answer, solution = gold_answer(answer), solution or answer.partition("####")[0]
    return row.get("problem") or row["question"], answer, solution


def reader(row: dict, where: str):
    """The reader whose fields `row` has; BadArgument naming the fields where none does."""
    for fields, read in (
        ({"prompt", "reward_model"}, dapo),
        ({"problem", "ground_truth_solution"}, openthoughts),
        ({"question", "final_answer"}, deepmath),
        ({"problem", "answer"}, plain),
        ({"problem", "solution"}, plain),
        ({"question", "answer"}, plain),
    ):
        if fields <= row.keys():
            return read
    raise BadArgument(
        f"{where} has the fields {', '.join(row)}; none of the known datasets does. "
        "Rename them to problem, answer and solution (docs/guides/data.md)"
    )


def read_problems(source: str) -> Iterator[Problem]:
    """Every row of `source` as a Problem; an answer or a solution that the row does not have is empty."""
    read = None
    for where, number, row in read_rows(source):
        read = read or reader(row, where)
        try:
            problem, answer, solution = ("" if v is None else str(v).strip() for v in read(row))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise BadArgument(f"{where} is not like the rows before it ({type(error).__name__}: {error})") from None
        extra = row.get("extra_info")
        own = row.get("id", extra.get("index") if isinstance(extra, dict) else None)
        yield Problem(str(own) if own is not None else f"{Path(source).stem}-{number}", problem, answer, solution)


# -- contamination ---------------------------------------------------------------------------------------------------


def words(text: str) -> tuple[str, ...]:
    """What is left of a problem without case, punctuation and LaTeX commands, which differ between collections."""
    text = re.sub(r"\\[a-zA-Z]+", " ", unicodedata.normalize("NFKC", text))
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


class Contamination:
    """The evaluation problems' 13-grams; a problem of fewer words must be met as a whole."""

    def __init__(self, sources: Iterable[str]):
        self.grams: dict[tuple[str, ...], str] = {}
        self.whole: dict[tuple[str, ...], str] = {}
        for source in sources:
            for problem in read_problems(source):
                text, name = words(problem.problem), f"{Path(source).name}:{problem.id}"
                self.whole.setdefault(text, name)
                for gram in _grams(text):
                    self.grams.setdefault(gram, name)

    def find(self, problem: str) -> str | None:
        """The evaluation problem that shares a 13-gram with `problem`, or is the same."""
        text = words(problem)
        return self.whole.get(text) or next((self.grams[g] for g in _grams(text) if g in self.grams), None)


def _grams(text: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1))


# -- the command -----------------------------------------------------------------------------------------------------


def prepare(sources: list[str], evaluation: list[str], output: Path, max_characters: int) -> None:
    """Write what is usable of `sources` to `output`, all of it or nothing, and print what became of every row."""
    if output.exists():
        raise BadArgument(f"{output} exists; remove it or choose another --output")
    contamination = Contamination(evaluation)
    counts, hits, seen, without_solution = Counter(), [], set(), 0
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for source in sources:
                for problem in read_problems(source):
                    fate = _fate(problem, contamination, seen, hits, max_characters)
                    counts[fate] += 1
                    if fate == "written":
                        without_solution += not problem.solution
                        file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
        if not counts["written"]:
            raise BadArgument(f"no row is left: {', '.join(f'{n} {fate}' for fate, n in counts.items()) or 'no rows'}")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)

    print(f"{counts.total():>9,} rows read")
    for fate, n in sorted(counts.items(), key=lambda item: item[0] == "written"):
        print(f"{n:>9,} {fate}" + (f" to {output}" if fate == "written" else ""))
    for own, other in hits[:_SHOWN]:
        print(f"          contaminated: {own} is like {other}")
    if not evaluation:
        print("no --evaluation was given: nothing was checked for contamination")
    if without_solution:
        print(f"{without_solution:,} rows have no solution: let data.teacher_template use {{answer}} instead")


def _fate(problem: Problem, contamination: Contamination, seen: set, hits: list, max_characters: int) -> str:
    text = words(problem.problem)
    if not text or not problem.answer:
        return "without a problem or a verifiable answer"
    if len(problem.problem) + len(problem.solution) > max_characters:
        return f"longer than {max_characters:,} characters"
    if text in seen:
        return "duplicates"
    seen.add(text)
    if other := contamination.find(problem.problem):
        hits.append((problem.id, other))
        return "contaminated"
    return "written"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadArgument(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help=".jsonl or .parquet files, or hub datasets name[:config]:split")
    parser.add_argument("--evaluation", action="append", default=[], help="an evaluation set; may be repeated")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .jsonl file to write; must not exist")
    parser.add_argument(
        "--max-characters",
        type=int,
        default=8000,
        help="drop rows whose problem and solution are longer together: the teacher reads both (8000)",
    )
    try:
        arguments = parser.parse_args(argv)
        prepare(arguments.sources, arguments.evaluation, arguments.output, arguments.max_characters)
    except (BadArgument, OSError) as error:
        print(f"prepare_data: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, BadArgument) else 1
    except KeyboardInterrupt:
        print("prepare_data: error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
