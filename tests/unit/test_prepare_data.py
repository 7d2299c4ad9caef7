"""`megatron-egrsd prepare-data`: rows of every data set into one schema, without the evaluation sets' problems."""

import functools
import json
from pathlib import Path

import pytest

from megatron_egrsd.config import DataConfig
from megatron_egrsd.data.problems import load_problems
from megatron_egrsd.data.values import answer_text
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.preparation import command as prepare_command
from megatron_egrsd.preparation.readers import read_problems
from tests.command_line import run_command

DATA = Path(__file__).parents[1] / "data"
AIME = [json.loads(line) for line in (DATA / "aime24.jsonl").read_text().splitlines()]
DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
prepare = functools.partial(run_command, "prepare-data")


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = {
    "dapo": (
        {
            "prompt": [{"role": "user", "content": DAPO_PROMPT.format("What is 2+3?\n\nGive a digit.")}],
            "reward_model": {"ground_truth": "5", "style": "rule"},
            "extra_info": {"index": "u-1"},
        },
        {"id": "u-1", "problem": "What is 2+3?\n\nGive a digit.", "answer": "5", "solution": ""},
    ),
    "openthoughts": (
        {
            "problem": "Return your final response within \\boxed{}. What is 2+3?",
            "ground_truth_solution": "Two and three are $\\boxed{5}$.",
            "deepseek_solution": "Five.",
            "domain": "math",
        },
        {"id": "x-1", "problem": "What is 2+3?", "answer": "5", "solution": "Two and three are $\\boxed{5}$."},
    ),
    "openthoughts_math_30k_opsd": (
        {"problem": "What is 2+3?", "solution": "Two is $\\boxed{2}$.\nWith three: $\\boxed{5}$."},
        {
            "id": "x-1",
            "problem": "What is 2+3?",
            "answer": "5",
            "solution": "Two is $\\boxed{2}$.\nWith three: $\\boxed{5}$.",
        },
    ),
    "deepmath": (
        {
            "question": "What is 2+3?",
            "final_answer": "5",
            "r1_solution_1": "<think>hm</think>\n\nIt is 5.",
            "topic": "Algebra",
        },
        {"id": "x-1", "problem": "What is 2+3?", "answer": "5", "solution": "It is 5."},
    ),
    "gsm8k": (
        {"question": "What is 2+3?", "answer": "Count.\n#### 5"},
        {"id": "x-1", "problem": "What is 2+3?", "answer": "5", "solution": "Count."},
    ),
    "plain": (
        {"id": 7, "problem": "What is 2+3?", "answer": 5, "solution": "Count."},
        {"id": "7", "problem": "What is 2+3?", "answer": "5", "solution": "Count."},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_dataset(name, tmp_path):
    row, expected = ROWS[name]
    done = prepare(jsonl(tmp_path / "x.jsonl", row), "-o", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "out.jsonl") == [expected]
    assert ("have no solution" in done.stdout) == (not expected["solution"])


@pytest.mark.heavy
def test_parquet_and_the_trainers_own_reader(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [ROWS["dapo"][0], ROWS["dapo"][0] | {"prompt": [{"role": "user", "content": DAPO_PROMPT.format("1+1?")}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    assert prepare(tmp_path / "dapo.parquet", "-o", tmp_path / "out.jsonl").returncode == 0
    config = DataConfig(teacher_template="{problem} {answer}")
    assert [p.problem for p in load_problems(str(tmp_path / "out.jsonl"), config)] == [
        "What is 2+3?\n\nGive a digit.",
        "1+1?",
    ]


def test_contaminated_rows_are_dropped_and_named(tmp_path):
    def row(i: int, problem: str) -> dict:
        return {"id": f"row-{i}", "problem": problem, "answer": "1", "solution": "s"}

    leaked = AIME[1]["problem"]
    rows = [
        row(0, "An entirely different question about nine green bottles and how many of them are left over, please?"),
        row(1, leaked),
        # Other case, typesetting and surroundings; and a part of thirteen words or more.
        row(2, "Warm-up: " + AIME[2]["problem"].upper().replace("$", "").replace(" ", "  ")),
        row(3, "Consider this. " + " ".join(AIME[3]["problem"].split()[:30])),
    ]
    done = prepare(
        jsonl(tmp_path / "in.jsonl", *rows), "-o", tmp_path / "out.jsonl",
        "--evaluation", DATA / "aime24.jsonl", "--evaluation", DATA / "minerva_math.jsonl",
        "--evaluation", DATA / "gsm8k_test.jsonl", "--evaluation", DATA / "amc23.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [r["id"] for r in written(tmp_path / "out.jsonl")] == ["row-0"]
    assert "3 contaminated" in done.stdout
    for i in (1, 2, 3):
        assert f"row-{i} is like aime24.jsonl:{AIME[i]['id']}" in done.stdout


def test_short_evaluation_problems_count_only_as_a_whole(tmp_path):
    evaluation = jsonl(tmp_path / "short.jsonl", {"problem": "What is $2+3$?", "answer": "5"})
    rows = [{"problem": p, "answer": "5", "solution": "s"} for p in ("what is 2+3", "What is 2+3 in base four?")]
    done = prepare(jsonl(tmp_path / "in.jsonl", *rows), "-o", tmp_path / "out.jsonl", "--evaluation", evaluation)
    assert done.returncode == 0, done.stderr
    assert [r["problem"] for r in written(tmp_path / "out.jsonl")] == ["What is 2+3 in base four?"]


def test_unusable_rows_are_counted(tmp_path):
    thoughts = ROWS["openthoughts"][0]
    rows = [
        thoughts,
        thoughts | {"problem": "What is  $2+3$ ?"},  # a duplicate but for spaces and delimiters
        thoughts | {"problem": "Sort a list.", "domain": "code"},
        thoughts | {"problem": "Prove it.", "ground_truth_solution": "Clear."},
        thoughts | {"problem": "A long one", "ground_truth_solution": "\\boxed{5}" + "x" * 500},
    ]
    out = tmp_path / "out.jsonl"
    done = prepare(jsonl(tmp_path / "in.jsonl", *rows), "-o", out, "--max-characters", "500")
    assert done.returncode == 0, done.stderr
    for line in ("5 rows read", "1 duplicates", "2 without a problem or a verifiable answer", "1 longer than 500"):
        assert line in done.stdout
    assert len(written(out)) == 1


NOTHING = {  # of the rows that hold more than texts
    "dapo": [{"prompt": None}, {"prompt": []}, {"prompt": [{"role": "user", "content": None}]}, {"reward_model": None}],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_without_a_problem_are_counted(name, tmp_path, capsys):
    row = ROWS[name][0]
    key = "problem" if "problem" in row else "question"
    nothing = NOTHING.get(name, [{key: None}, {key: " "}, {key: ""}])
    source = jsonl(tmp_path / "in.jsonl", row, *(row | change for change in nothing))
    prepare_command.main([str(source), "-o", str(tmp_path / "out.jsonl")])
    assert f"{len(nothing)} without a problem or a verifiable answer" in capsys.readouterr().out
    assert len(written(tmp_path / "out.jsonl")) == 1


def test_rows_of_the_papers_set(tmp_path):
    """Rows without a box are counted and left out; the contamination check applies; the trainer reads the rest."""
    rows = [
        {"problem": "What is 2+3?", "solution": "It is $\\boxed{\\frac{10}{2}}$."},
        {"problem": "Prove that 2+3 is 5.", "solution": "Clear."},
        {"problem": "An empty box?", "solution": "\\boxed{}"},
        {"problem": "No solution?", "solution": None},
        {"problem": AIME[1]["problem"], "solution": "\\boxed{1}"},
    ]
    out = tmp_path / "out.jsonl"
    done = prepare(jsonl(tmp_path / "in.jsonl", *rows), "-o", out, "--evaluation", DATA / "aime24.jsonl")
    assert done.returncode == 0, done.stderr
    assert "5 rows read" in done.stdout and "3 without a problem or a verifiable answer" in done.stdout
    assert "1 contaminated" in done.stdout and f"in-5 is like aime24.jsonl:{AIME[1]['id']}" in done.stdout
    (problem,) = load_problems(str(out), DataConfig())
    assert (problem.problem, problem.answer, problem.solution) == (
        "What is 2+3?",
        r"\frac{10}{2}",
        r"It is $\boxed{\frac{10}{2}}$.",
    )


@pytest.mark.parametrize(
    ("rows", "words", "reason"),
    [
        ([{"text": "x"}], [], "has the fields text"),
        ([ROWS["plain"][0], {"id": 8}], [], "line 2 is not like the rows before it"),
        ([ROWS["plain"][0]], ["--evaluation", "missing.jsonl"], "there is no file missing.jsonl"),
        ([ROWS["plain"][0] | {"answer": ""}], [], "no row is left"),
    ],
)
def test_refusals_leave_nothing(rows, words, reason, tmp_path):
    out = tmp_path / "out" / "train.jsonl"
    done = prepare(jsonl(tmp_path / "in.jsonl", *rows), "-o", out, *words)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not out.exists() and not list(tmp_path.rglob("*.partial"))


def test_an_existing_file_is_kept(tmp_path):
    out = jsonl(tmp_path / "out.jsonl", {"mine": 1})
    done = prepare(jsonl(tmp_path / "in.jsonl", ROWS["plain"][0]), "-o", out)
    assert done.returncode == 2 and "exists" in done.stderr and written(out) == [{"mine": 1}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('["2"]', "2"),
        ("['$7$']", "$7$"),
        (["2"], "2"),
        ([["2"]], "2"),
        ([3.0], "3"),
        (b"2", "2"),
        ("b'2'", "2"),
        (27.0, "27"),
        (" 5 ", "5"),
        ("[1, 2)", "[1, 2)"),
        ("[1, 2]", "[1, 2]"),  # an interval
        ("[-1]", "[-1]"),
        (r"\{1,2\}", r"\{1,2\}"),
        (float("nan"), ""),
        (float("inf"), ""),
        ("nan", ""),
        ('["2", "3"]', ""),
        (["2", "3"], ""),
        ([], ""),
        ({"value": 2}, ""),
        (True, ""),
        (b"\xff", ""),
        (None, ""),
        ('["2', '["2'),
    ],
)
def test_answers_of_other_types_are_unwrapped_or_dropped(value, text):
    assert answer_text(value) == text


@pytest.mark.heavy
def test_parquet_rows_whose_answers_are_no_text(tmp_path):
    """Each was written as its spelling in Python: rewards of 0 for ever."""
    import pyarrow
    import pyarrow.parquet

    for name, answers, kept in (
        ("text", ['["2"]', "['$7$']", '["1", "2"]'], ["2", "$7$"]),
        ("lists", [["2"], ["3", "4"], []], ["2"]),
        ("bytes", [b"2", b"\xff", b"3"], ["2", "3"]),
        ("numbers", [2.0, float("nan"), 0.5], ["2", "0.5"]),
    ):
        rows = [{"problem": f"Problem {i} of {name}?", "answer": a, "solution": "s"} for i, a in enumerate(answers)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        problems = list(read_problems(str(tmp_path / f"{name}.parquet")))
        assert [p.answer for p in problems if p.answer] == kept, name
    prepare_command.prepare([str(tmp_path / "numbers.parquet")], [], tmp_path / "out.jsonl", 8000)
    assert [row["answer"] for row in written(tmp_path / "out.jsonl")] == ["2", "0.5"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), '["2"]', "['$7$']", "b'2'", "nan", ["2"]])
def test_training_refuses_values_that_are_no_text(value, tmp_path):
    file = jsonl(tmp_path / "d.jsonl", {"problem": "p", "answer": value, "solution": "s"})
    with pytest.raises(BadArgument, match="line 1: field 'answer'"):
        load_problems(str(file), DataConfig())
    file = jsonl(tmp_path / "e.jsonl", {"problem": "p", "answer": "1", "solution": value})
    with pytest.raises(BadArgument, match="line 1: field 'solution'"):
        load_problems(str(file), DataConfig())


def test_one_problem_with_two_answers_is_named_and_counted_apart(tmp_path, capsys):
    rows = [("a", "What is 2 + 2?", "4"), ("b", "What is 2 + 2 ?", "$4$"), ("c", "What is 2 + 2?", "8")]
    file = jsonl(tmp_path / "d.jsonl", *({"id": i, "problem": p, "answer": a, "solution": "s"} for i, p, a in rows))
    prepare_command.prepare([str(file)], [], tmp_path / "out.jsonl", 8000)
    out = capsys.readouterr().out
    assert "1 duplicates\n" in out and "1 duplicates with another answer than the first" in out
    assert "contradicting: a says 4, c says 8" in out
    with pytest.raises(BadArgument, match=r"line 2: the problem of .* line 1 again with the answer '8' instead of '4'"):
        load_problems(str(jsonl(tmp_path / "e.jsonl", *written(file)[::2])), DataConfig())
