"""Problems from files, the errors they give, and the order of training."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_egrsd.config import DataConfig
from megatron_egrsd.data.problems import BadRows, Place, batch_indices, load_problems, problem_indices
from megatron_egrsd.errors import BadArgument

DATA = Path(__file__).parents[1] / "data"
ANSWER_ONLY = DataConfig(teacher_template="{problem} The answer is {answer}.")


def write(tmp_path, *rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "config", "rows"),
    [
        ("gsm8k_test", DataConfig(problem_key="question", solution_key="answer"), 40),
        ("aime24", DataConfig(), 20),
        ("amc23", ANSWER_ONLY, 40),
        ("minerva_math", DataConfig(answer_key="solution"), 40),
    ],
)
def test_real_datasets_load(name, config, rows):
    problems = load_problems(str(DATA / f"{name}.jsonl"), config)
    assert len(problems) == rows
    assert len({p.id for p in problems}) == rows
    assert all(p.problem and p.answer for p in problems)


def test_numbers_become_text_and_rows_without_id_get_their_line(tmp_path):
    rows = [{"problem": "a", "answer": 27.0}, {"problem": "b", "answer": 7, "id": 0}, {"problem": "c", "answer": 0.5}]
    problems = load_problems(write(tmp_path, *rows), ANSWER_ONLY)
    assert [p.answer for p in problems] == ["27", "7", "0.5"]
    assert [p.id for p in problems] == ["1", "0", "3"]


def test_parquet_equals_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": i, "problem": f"{i}+1", "answer": str(i + 1), "solution": "count"} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    jsonl = write(tmp_path, *rows)
    assert load_problems(str(tmp_path / "p.parquet"), DataConfig()) == load_problems(jsonl, DataConfig())


GOOD = {"problem": "1+1", "answer": "2", "solution": "s"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, "not json"], ["line 2", "not JSON", "one JSON object a line"]),
        ([GOOD, [1, 2]], ["line 2", "list"]),
        ([GOOD, "", {"question": "q", "answer": "2"}], ["line 3", "'problem'", "'question'", "data.problem_key"]),
        ([GOOD, {"problem": "q", "solution": "s"}], ["line 2", "no field 'answer'", "data.answer_key"]),
        ([{**GOOD, "answer": None}], ["line 1", "'answer' is empty"]),
        ([{**GOOD, "answer": "  "}], ["line 1", "'answer' is empty"]),
        ([{**GOOD, "answer": ["2"]}], ["line 1", "list", "text or a number"]),
        ([{**GOOD, "answer": True}], ["truth value"]),
        ([{**GOOD, "problem": ""}], ["'problem' is empty"]),
        ([{"problem": "q", "answer": "2"}], ["'solution'", "data.solution_key", "{answer}"]),
        ([], ["holds no problems"]),
    ],
)
def test_bad_rows_are_named_in_one_sentence(tmp_path, rows, words):
    path = write(tmp_path, *rows)
    with pytest.raises(BadArgument) as error:
        load_problems(path, DataConfig())
    message = str(error.value)
    assert path in message and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.jsonl", "there is no file"),
        ("missing.parquet", "there is no file"),
        ("problems.csv", "neither"),
        (str(DATA), "neither"),
    ],
)
def test_bad_sources(source, words):
    with pytest.raises(BadArgument, match=words):
        load_problems(source, DataConfig())


def test_files_that_are_not_what_their_name_says(tmp_path):
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "x.jsonl").write_bytes(b'{"problem": "\xff"}\n')
    for name in ("x.parquet", "x.jsonl"):
        with pytest.raises(BadArgument, match=name):
            load_problems(str(tmp_path / name), DataConfig())


def test_a_solution_may_be_missing_where_no_teacher_reads_it(tmp_path):
    path = write(tmp_path, {"problem": "q", "answer": "2"})
    assert load_problems(path, ANSWER_ONLY)[0].solution == ""
    assert load_problems(path, DataConfig(), privileged=False)[0].solution == ""


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_every_problem_once_an_epoch(n, batch, seed):
    steps = -(-3 * n // batch)
    order = [i for step in range(steps) for i in batch_indices(n, batch, step, seed)]
    for epoch in range(3):
        assert Counter(order[epoch * n : (epoch + 1) * n]) == Counter(range(n))


def test_order_depends_on_seed_and_step_alone():
    assert batch_indices(1000, 8, 5, seed=1) == batch_indices(1000, 8, 5, seed=1)
    assert batch_indices(1000, 8, 5, seed=1) != batch_indices(1000, 8, 5, seed=2)
    assert batch_indices(1000, 8, 5, seed=1) != batch_indices(1000, 8, 6, seed=1)
    assert batch_indices(10, 4, 0, seed=0) == [1, 0, 2, 4]  # pinned: a resumed run sees the same order
    assert batch_indices(8, 8, 0, seed=0) != batch_indices(8, 8, 1, seed=0)


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path):
    path = write(tmp_path, GOOD, "not json", {**GOOD, "problem": "other"}, [1], GOOD, {**GOOD, "answer": " "}, "{")
    with open(path, "ab") as file:
        file.write(b'{"problem": "\xff", "answer": "1"}\n{"problem": "\\ud800", "answer": "1", "solution": "s"}\n')
    bad = BadRows("skip")
    problems = load_problems(path, DataConfig(bad_rows="skip"), bad=bad)
    assert [p.id for p in problems] == ["1", "3"]
    assert str(bad) == (
        "2 not JSON (line 2, line 7), 1 not an object (line 4), 1 duplicate (line 5), "
        "1 with an empty 'answer' (line 6), 2 not UTF-8 (line 8, line 9)"
    )


@pytest.mark.parametrize("field", ["id", "problem", "answer", "solution", "turns"])
def test_half_a_surrogate_pair_is_refused_in_every_field(field, tmp_path):
    """It could be trained, but no dump of its rollouts could be written."""
    row = {**GOOD, "id": "1", "turns": [{"role": "user", "content": "?"}]}
    row[field] = [{"role": "user", "content": "\ud800"}] if field == "turns" else "\ud800"
    with pytest.raises(BadArgument, match=f"line 1: field '{field}' holds half a surrogate pair; remove it, or set"):
        load_problems(write(tmp_path, row), DataConfig(teacher_key="turns"))


def test_a_file_of_bad_rows_alone_is_refused_with_the_reasons(tmp_path):
    with pytest.raises(BadArgument, match=r"holds no problems but bad rows: 2 without 'answer' \(line 1, line 2\)"):
        load_problems(write(tmp_path, {"problem": "a"}, {"problem": "b"}), DataConfig(bad_rows="skip"))


def test_a_duplicate_is_refused_naming_both_lines(tmp_path):
    with pytest.raises(BadArgument, match=r"line 3: the problem of .* line 1 again.*data.bad_rows skip"):
        load_problems(write(tmp_path, GOOD, {**GOOD, "problem": "other"}, GOOD), DataConfig())


def test_a_batch_size_that_changes_at_a_resume_leaves_out_no_problem():
    """A resume with twice the batch began at twice the place, and 16 of 64 problems were never seen."""
    n, before, after = 64, 8, 16
    seen = [i for step in range(2) for i in batch_indices(n, before, step, 0)]
    begin = Place(2, 2 * before)
    for step in range(2, 5):
        seen += problem_indices(n, begin.after(step, after), after, 0)
    assert sorted(seen) == list(range(n))
    assert problem_indices(n, Place().after(3, 8), 8, 0) == batch_indices(n, 8, 3, 0)
