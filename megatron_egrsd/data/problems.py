"""Problems from a file or the hub, and the order in which training visits them.

Every row is checked here, before anything is started. A row that cannot be trained on raises an error that names the
file, the line and the change to make. With `data.bad_rows: skip` it is left out and counted instead.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_egrsd.config import DataConfig
from megatron_egrsd.config.model import check_template, placeholders
from megatron_egrsd.data.boxes import boxes
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.data.values import is_wrapped, plain_value
from megatron_egrsd.errors import BadArgument

_ID_KEYS = ("id", "idx", "unique_id")
_SUFFIXES = (".jsonl", ".parquet")
_LISTED_ROWS = 5  # bad rows of a kind that a message lists


class BadRow(BadArgument):
    """A row that cannot be trained on: the kind of error, and its place ("line 3")."""

    def __init__(self, kind: str, place: str, message: str):
        super().__init__(message)
        self.kind, self.place = kind, place


class BadRows:
    """Collector of bad rows: `add` raises a BadRow, or counts it if `policy` is "skip"."""

    def __init__(self, policy: str):
        self.skip = policy == "skip"
        self.places: dict[str, list[str]] = {}

    def add(self, row: BadRow) -> None:
        if not self.skip:
            raise row
        self.places.setdefault(row.kind, []).append(row.place)

    def __str__(self) -> str:
        """Return the counts, such as "2 not JSON (line 3, line 9), 1 without an answer (line 4)"."""
        parts = []
        for kind, places in self.places.items():
            named = ", ".join(places[:_LISTED_ROWS]) + (", ..." if len(places) > _LISTED_ROWS else "")
            parts.append(f"{len(places)} {kind} ({named})")
        return ", ".join(parts)


def load_problems(
    source: str, config: DataConfig, *, privileged: bool = True, bad: BadRows | None = None
) -> list[Problem]:
    """Load every problem of `source`: a .jsonl or .parquet file, or a hub dataset "name[:config]:split".

    `privileged=False` says that no teacher will read these problems (evaluation, or an objective without a teacher):
    a reference solution may then be missing even if the teacher's template needs it. A row without an id gets its line
    number. An invalid row or a duplicate goes to `bad` (default: by the policy `config.bad_rows`). Raises BadArgument,
    naming file and line.
    """
    by_template = privileged and config.teacher_context == "template"
    need_solution = by_template and not config.teacher_key and "solution" in placeholders(config.teacher_template)
    bad = BadRows(config.bad_rows) if bad is None else bad
    problems, seen = [], {}
    for location, number, row in read_rows(source, bad):
        try:
            problem = _problem(row, location, number, config, need_solution)
            if by_template and config.teacher_key:
                problem = replace(problem, teacher_turns=_teacher_turns(row, config.teacher_key, location))
            _check_encodable(problem, config, location)
            text = " ".join(problem.problem.split())
            if text in seen:
                place, answer = seen[text]
                other, kind = "", "duplicate"
                if problem.answer.strip() != answer.strip():
                    other, kind = f" with the answer {problem.answer!r} instead of {answer!r}", "contradicting"
                raise _bad_row(kind, location, f"the problem of {place} again{other}; remove one of them")
            seen[text] = location, problem.answer
            problems.append(problem)
        except BadRow as error:
            bad.add(error)
    if not problems:
        left_out = f" but bad rows: {bad}" if bad.places else ""
        raise BadArgument(
            f"{source} holds no problems{left_out}; write one JSON object a line, such as "
            f'{{"{config.problem_key}": "...", "{config.answer_key}": "..."}}'
        )
    return problems


def batch_indices(n_problems: int, batch_size: int, step: int, seed: int | str) -> list[int]:
    """Return the problem indices of batch `step` (from 0) in an endless order that depends only on (seed, step).

    Each epoch is a new permutation and visits every problem exactly once; a batch may span two epochs. There is no
    state to save: a resumed run continues from its step number.
    """
    if n_problems <= 0 or batch_size <= 0 or step < 0:
        raise BadArgument(f"no batch of {batch_size} from {n_problems} problems at step {step}")
    return problem_indices(n_problems, step * batch_size, batch_size, seed)


def problem_indices(n_problems: int, first: int, count: int, seed: int | str) -> list[int]:
    """Return `count` problem indices of the endless order of `batch_indices`, from place `first` (from 0) on."""
    return [_permutation(n_problems, p // n_problems, seed)[p % n_problems] for p in range(first, first + count)]


@dataclass(frozen=True)
class Place:
    """A place in the endless order: `problems` of them are trained when `step` steps are.

    A resumed run begins at the place of its checkpoint, so that a changed batch size leaves out no problem.
    """

    step: int = 0
    problems: int = 0

    def after(self, step: int, batch_size: int) -> int:
        """Return the number of problems trained after `step` steps if each from `self.step` on trains `batch_size`."""
        return self.problems + (step - self.step) * batch_size


@lru_cache(maxsize=4)
def _permutation(n_problems: int, epoch: int, seed: int | str) -> tuple[int, ...]:
    # Python's generator, seeded with text, gives the same order on every platform and numpy version.
    order = list(range(n_problems))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def is_hub_dataset(source: str) -> bool:
    """Return whether `read_rows` would download `source`."""
    path = Path(source)
    return path.suffix not in _SUFFIXES and ":" in source and not path.exists()


def read_rows(source: str, bad: BadRows | None = None) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (location for messages, row number from 1, row). An invalid row goes to `bad` (default: raise it)."""
    bad = BadRows("refuse") if bad is None else bad
    path = Path(source)
    if is_hub_dataset(source):
        return _hub_rows(source)
    if path.suffix not in _SUFFIXES:
        raise BadArgument(
            f"{source!r} is neither a .jsonl nor a .parquet file, nor a hub dataset written as "
            '"name:split" or "name:config:split"'
        )
    if not path.is_file():
        raise BadArgument(
            f"there is no file {source}; data.train and data.evaluation are paths from the "
            f"directory the run starts in, which is {Path.cwd()}"
        )
    return _jsonl_rows(path, bad) if path.suffix == ".jsonl" else _parquet_rows(path)


def _bad_row(kind: str, location: str, message: str) -> BadRow:
    return BadRow(kind, " ".join(location.split()[-2:]), f"{location}: {message}, or set data.bad_rows skip")


def _jsonl_rows(path: Path, bad: BadRows) -> Iterator[tuple[str, int, dict[str, Any]]]:
    try:
        file = open(path, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise BadArgument(f"{path} cannot be read: {error.strerror}") from None
    with file:  # bytes: so a line that is not UTF-8 is reported like any other bad line
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            location = f"{path} line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8
                kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
                reason = f"not JSON in UTF-8 ({error}); write one JSON object a line"
                bad.add(_bad_row(kind, location, reason))
                continue
            if not isinstance(row, dict):
                reason = (
                    f"a JSON {_kind(row)}; write an object with the fields data.problem_key and data.answer_key name"
                )
                bad.add(_bad_row("not an object", location, reason))
                continue
            yield location, number, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BadArgument(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", number, row


def _hub_rows(source: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import datasets

    name, *subset, split = source.split(":")
    try:
        rows = datasets.load_dataset(name, *subset, split=split)
    except Exception as error:  # the hub client raises some twenty types
        reason = " ".join(str(error).split())[:300]
        raise BadArgument(
            f"the dataset {source} cannot be loaded ({reason}); download it and give a .jsonl or "
            ".parquet file if this machine has no network"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source} row {number}", number, dict(row)


def _problem(row: dict, location: str, number: int, config: DataConfig, need_solution: bool) -> Problem:
    problem = _text(row, config.problem_key, location, "data.problem_key")
    box = _boxed_answer(row, config)
    answer = box or _text(row, config.answer_key, location, "data.answer_key")
    solution = ""
    if need_solution or row.get(config.solution_key) is not None:
        hint = "data.solution_key, or let data.teacher_template use {answer} instead of {solution}"
        solution = _text(row, config.solution_key, location, hint, blank=not need_solution)
    key = next((k for k in _ID_KEYS if isinstance(row.get(k), (str, int))), None)
    return Problem(str(row[key]) if key else str(number), problem, answer, solution)


def _boxed_answer(row: dict[str, Any], config: DataConfig) -> str:
    """Return the last box of the solution of a row that has no answer; "" if it has one, or no box."""
    solution = row.get(config.solution_key)
    if row.get(config.answer_key) is not None or not isinstance(solution, str):
        return ""
    found = boxes(solution)
    return found[-1].content if found else ""


def _teacher_turns(row: dict[str, Any], key: str, location: str) -> list[dict[str, str]]:
    """Return the teacher's ready-made conversation; a text is one turn of the user. Raises BadRow if it is unusable."""
    value = row.get(key)
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    try:
        check_template(f"field {key!r}", turns or [])
    except BadArgument as error:
        raise _bad_row(f"with an unusable {key!r}", location, str(error)) from None
    return [dict(turn) for turn in turns]


def _text(row: dict[str, Any], key: str, location: str, setting: str, blank: bool = False) -> str:
    """Return the field as text; a number becomes text, 27.0 becomes "27". Raises BadRow if the field is unusable."""
    if key not in row:
        has = ", ".join(map(repr, row)) or "none"
        raise _bad_row(f"without {key!r}", location, f"no field {key!r}; it has {has[:300]}: set {setting}")
    value = row[key]
    if isinstance(value, float):
        value = int(value) if value.is_integer() else plain_value(value)  # None if it is no finite number
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) and value is not None:
        raise _bad_row(
            f"with another type of {key!r}", location, f"field {key!r} is a {_kind(value)}; write text or a number"
        )
    if not blank and not (value or "").strip():
        raise _bad_row(
            f"with an empty {key!r}", location, f"field {key!r} is empty; fill it, remove the row, set {setting}"
        )
    if is_wrapped(value or ""):
        spelling = f"field {key!r} is {value[:40]!r}, another type of value in text"
        raise _bad_row(f"with another type of {key!r}", location, f"{spelling}; prepare-data unwraps or drops it")
    return value or ""


def _check_encodable(problem: Problem, config: DataConfig, location: str) -> None:
    """Raise BadRow if a text holds half a surrogate pair: JSON can contain it, but no tokenizer or file accepts it."""
    keys = "id", config.problem_key, config.answer_key, config.solution_key
    for key, text in zip_longest(keys, problem.texts, fillvalue=config.teacher_key):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _bad_row("not UTF-8", location, f"field {key!r} holds half a surrogate pair; remove it") from None


def _kind(value: Any) -> str:
    names = {list: "list", dict: "object", bool: "truth value", str: "text", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, (int, float)) else type(value).__name__)
