"""The problem sets of `megatron-egrsd evaluate`, by name, file or dataset. Nothing is downloaded without permission."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_egrsd.config import BenchmarksConfig, DataConfig
from megatron_egrsd.data.problems import BadRows, is_hub_dataset, load_problems, read_rows
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.errors import BadArgument

# Name -> Hugging Face dataset, as "name[:configuration]:split".
BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "math-ai/aime25:test",
    "amc23": "math-ai/amc23:test",
    "math500": "HuggingFaceH4/MATH-500:test",
    "minerva": "math-ai/minervamath:test",
    "gsm8k": "openai/gsm8k:main:test",
    "hmmt25": "MathArena/hmmt_feb_2025:train",
}
_PROBLEM_KEYS = ("problem", "question", "prompt")
_ANSWER_KEYS = ("answer", "expected_answer", "final_answer", "solution")  # a solution has the answer in a box


@dataclass(frozen=True)
class ProblemSet:
    """A set of problems: its name in tables and files, its source, its problems, and the rows that were left out."""

    name: str
    source: str
    problems: list[Problem]
    bad: BadRows = field(default_factory=lambda: BadRows("refuse"))


def load_sets(benchmarks: BenchmarksConfig, data: DataConfig) -> list[ProblemSet]:
    """Load the sets that `evaluation.benchmarks.sets` names or, if it is empty, the set of `data.evaluation`.

    A set is a name of BENCHMARKS, a file, "NAME=FILE", or a dataset "name[:configuration]:split" of the hub. Raises
    BadArgument if a set is missing, if two sets have one name, or if two problems of a set have one id.
    """
    words = benchmarks.sets or [data.evaluation] * bool(data.evaluation)
    if not words:
        raise BadArgument(
            f"no set to evaluate on: name {', '.join(BENCHMARKS)} or a file, or set data.evaluation "
            "(megatron-egrsd evaluate aime24 my.jsonl --model.path ...)"
        )
    sets = [_load(word, benchmarks, data) for word in words]
    names = [s.name for s in sets]
    for name in names:
        if names.count(name) > 1:
            raise BadArgument(f"two sets are called {name}; name one of them: NAME=FILE")
    return sets


def _load(word: str, benchmarks: BenchmarksConfig, data: DataConfig) -> ProblemSet:
    name, named, source = ("", "", word) if Path(word).is_file() else word.partition("=")  # out/lr=1e-6/test.jsonl
    if not named:
        name, source = (word, _find(word, benchmarks)) if word in BENCHMARKS else (_stem(word), word)
    if is_hub_dataset(source) and not benchmarks.hub:
        raise BadArgument(
            f"{word} would be downloaded from the Hugging Face hub ({source}): allow that with "
            f"--evaluation.benchmarks.hub true, or name a file: {name}=FILE.jsonl"
            + (f", or put {name}.jsonl into evaluation.benchmarks.directory" * (not named))
        )
    bad = BadRows(data.bad_rows)
    problems = load_problems(source, _with_keys(source, data), privileged=False, bad=bad)
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise BadArgument(f"{source}: two problems have the id {problem.id!r}; make the ids unique")
        seen.add(problem.id)
    return ProblemSet(name, source, problems, bad)


def _find(name: str, benchmarks: BenchmarksConfig) -> str:
    """Return the prepared file of a benchmark if there is one, else its dataset."""
    if benchmarks.directory:
        for suffix in (".jsonl", ".parquet"):
            if (path := Path(benchmarks.directory) / (name + suffix)).is_file():
                return str(path)
    return BENCHMARKS[name]


def _stem(source: str) -> str:
    return source.replace("/", "--").replace(":", "--") if is_hub_dataset(source) else Path(source).stem


def _with_keys(source: str, data: DataConfig) -> DataConfig:
    """Return `data` with the first row's names for problem and answer if it lacks the configured ones."""
    row = next((row for _, _, row in read_rows(source, BadRows(data.bad_rows))), {})
    problem = [key for key in (data.problem_key, *_PROBLEM_KEYS) if key in row]
    answer = [key for key in (data.answer_key, *_ANSWER_KEYS) if key in row]
    return replace(data, problem_key=(problem or [data.problem_key])[0], answer_key=(answer or [data.answer_key])[0])
