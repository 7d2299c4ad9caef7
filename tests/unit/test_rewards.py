"""The verifier on formats, on real problems, on hostile strings; and the batch interface around it."""

import json
import logging
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd import verifier
from megatron_egrsd.answers import final_answer, gold_answer, same_text
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.rewards import load_reward, math_reward, score
from megatron_egrsd.samples import Problem, Prompt, Rollout

DATA = Path(__file__).parents[1] / "data"

# (response, answer)
RIGHT = [
    ("42", "42"),
    ("The answer is 18.", "#### 18"),
    ("A: 18", "so\n#### 18"),
    (r"\boxed{1,234}", "1234"),
    ("$1,234.00", "#### 1,234"),
    ("It is 07", "7"),
    ("7", "07"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{90}", r"90^{\circ}"),
    (r"\boxed{5\text{ cm}^2}", "5"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{0.5}", r"50\%"),
    (r"\boxed{\text{June 20}}", r"\text{June 20}"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{\text{(B)}}", r"\text{B}"),
    (r"\boxed{1} and \boxed{2}", "1,2"),
    (r"$\boxed{3}$, $\boxed{5}$ and $\boxed{7}$", "3,5,7"),
    (r"\boxed{2,1}", "1,2"),
    (r"\boxed{(1,2]}", "(1, 2]"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}"),
    (r"\boxed{[0,\infty)}", r"x \in [0, \infty)"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{5}", "x=5"),
    ("<think>so 3? \\boxed{3}</think>\n\nThe answer is 4", "4"),
    (r"The final answer is $\frac{3}{4}$. I hope it is correct.", r"\frac{3}{4}"),
    ("**Answer:** 18 dollars", "18"),
    ("# Answer\n\n18", "18"),
    ("She makes 9*2 = 18 dollars a day.", "18"),
    ("So, in total, that gives 1,200 apples in the whole of this very long sentence.", "1200"),
    (r"\boxed{3\frac{1}{2}}", r"\frac{7}{2}"),
    (r"\boxed{4.5\times 10^{33}}", "4.5e33"),
    (r"\boxed{2\pi}", r"2 \pi"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{-\frac{1}{3}}", r"\frac{-1}{3}"),
    (r"\boxed{0.333333}", "1/3"),
    (r"\boxed{\$18}", "18"),
    (r"the answer is: $$\boxed{10\,000}$$", "10000"),
    (r"\boxed{18 \text{ dollars per day}}", "18"),
    (r"\boxed{\left(3, \frac{\pi}{2} \right)}", r"(3,\pi/2)"),
    (r"\boxed{y = 2x + 1}", "y=2x+1"),
    (r"\boxed{2x+1}", "y=2x+1"),
    (r"\boxed{x \ge 3}", r"x\geq 3"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"The answer is \(\frac{5}{6}\).", r"\frac56"),
    ("answer: -5", "-5"),
    ("The total cost is $25.50", "25.5"),
    (r"The value is $\frac{1}{2}$.", r"\frac{1}{2}"),
    (r"\boxed{1/2}", r"\frac12"),
    (r"\boxed{\text{even}}", "even"),
    ("The answer is (C).", "C"),
    (r"\boxed{3 + 4i}", "4i+3"),
    (r"\boxed{11}_{2}", "11"),
    (r"\boxed{5 \text{ or } 7}", "5,7"),
    (r"\boxed{5 and 7}", "7,5"),
    (r"\boxed{1\pm\sqrt{2}}", r"1+\sqrt2,1-\sqrt2"),
    (r"\boxed{10^{-3}}", "0.001"),
    ("18", "18."),
    ("So he has 3 hours.\nThe answer is 3 hours", "3"),
    (r"\boxed{12.0}", "12"),
    (r"\fbox{9}", "9"),
    (r"\boxed 5", "5"),
    (r"\boxed{45 minutes}", "45"),
    (r"\boxed{6:00 PM}", r"6:00 \text{ p.m.}"),
    (r"The final answer is \$18", "18"),
    ("Janet makes **$18** every day at the market, as computed above.", "18"),
    (r"$\boxed{\text{Evelyn}}$", r"\text{Evelyn}"),
    (r"\boxed{2516_8}", "2516_8"),
    (r"\boxed{2516}", "2516_8"),
    (r"\boxed{.5}", "0.5"),
    ("The answer is 5/8 of the cake.", "5/8"),
    (r"\boxed{3:2}", "3:2"),
    (r"\boxed{x^2 + 3x}", "3x+x^2"),
    (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}"),
    (r"\boxed{\log_2 8}", "3"),
    (r"\boxed{5!}", "120"),
    (r"\boxed{-4,-1}", "-1,-4"),
    (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(3,\infty)\cup(-\infty,2)"),
]

WRONG = [
    ("41", "42"),
    (r"\boxed{2}", r"2\pi"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"<think> \boxed{4}", "4"),
    (r"\boxed{1234}", "1235"),
    ("", "5"),
    (r"\boxed{}", "5"),
    (r"\boxed{(1,2)}", "[1,2]"),
    (r"\boxed{odd}", "even"),
    (r"\boxed{3} or \boxed{4}", "3"),
    (r"\boxed{x=5}", "y=4"),
    (r"\boxed{0.33}", "1/3"),
    (r"\boxed{5\%}", "0.5"),
    (r"\boxed{-5}", "5"),
    (r"\boxed{1,2}", "1,2,3"),
    (r"\boxed{70}", "7"),
    (r"\boxed{3x}", "3"),
    (r"\boxed{A}", "B"),
    (r"\boxed{12}", "1,2"),
    (r"\boxed{(2,1)}", "(1,2)"),
    ("I do not know", "7"),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right(response, answer):
    assert math_reward(response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong(response, answer):
    assert math_reward(response, answer) == 0.0


FORMATS = [
    "<think>Is it \\boxed{1}? No.</think>\n\nThe answer is \\boxed{%s}.",
    "The answer is $%s$.",
    "So we are done.\n#### %s",
    "Final Answer: The final answer is $%s$. I hope it is correct.",
    "**Answer:** $%s$",
]


@pytest.mark.parametrize(
    ("name", "key", "formats"),
    [
        ("gsm8k_test", "answer", [*FORMATS, "%s", "A: %s", "The answer is %s.", "That makes %s dollars in all."]),
        ("aime24", "answer", [*FORMATS, "%s", "A: %s", "The answer is %s."]),
        ("amc23", "answer", [*FORMATS, "%s", "A: %s"]),
        ("minerva_math", "solution", [FORMATS[0], FORMATS[2]]),
    ],
)
def test_real_answers_in_every_format(name, key, formats):
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    golds = [str(int(r[key])) if isinstance(r[key], float) else r[key] for r in rows]
    answers = [gold_answer(g) for g in golds]
    others = answers[1:] + answers[:1]
    for template in formats:
        for gold, right, wrong in zip(golds, answers, others, strict=True):
            assert math_reward(template.replace("%s", right), gold) == 1.0, (template, right)
            if same_text(right, wrong) is False:
                assert math_reward(template.replace("%s", wrong), gold) == 0.0, (template, wrong, gold)


def test_unfinished_thinking_is_no_answer():
    assert final_answer("<think>The answer is \\boxed{4}") == []
    assert final_answer("It is \\boxed{3}. <think> \\boxed{4} </think> \\boxed{5}") == ["5"]
    assert final_answer("</think>7") == ["7"]  # a template may have opened the thinking in the prompt


def test_plain_numbers_are_fast_and_never_start_math_verify(monkeypatch):
    monkeypatch.setattr(verifier._worker, "ask", None)
    start = time.perf_counter()
    for i in range(2000):
        assert math_reward(str(i), "42") == float(i == 42)
    assert time.perf_counter() - start < 4  # 0.2 s on an idle core


@pytest.mark.parametrize("bomb", ["10^{10^{10^{10}}}", "99999999!"])
def test_a_computation_without_end_scores_zero_in_time(bomb):
    start = time.perf_counter()
    assert math_reward(f"\\boxed{{{bomb}}}", "x+5") == 0.0
    assert time.perf_counter() - start < 50  # five CPU seconds, however busy the machine
    assert math_reward(r"\boxed{(x+2)^2}", "x^2+4x+4") == 1.0  # a fresh worker took over


def test_hostile_strings():
    start = time.perf_counter()
    for text in [
        "\\boxed{" * 100_000,
        "{" * 10**6,
        "answer is " * 50_000,
        "$" * 100_001,
        "1," * 100_000,
        "9" * 100_000,
        "9e999999999",
        "\\boxed{a} and " * 10_000,
        "\x00\ud800",
        "\\boxed{\ud800}",
        "-" * 100_000,
        "\\frac" * 10_000,
        "<think>" * 10_000,
        "A: " * 100_000,
    ]:
        assert math_reward(text, "5") == 0.0
        assert math_reward("\\boxed{5}", text) == 0.0
    assert time.perf_counter() - start < 30


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["5", r"\frac{1}{2}", "#### 18", ""]))
def test_no_text_raises(response, answer):
    assert math_reward(response, answer) in (0.0, 1.0)


def test_threads_may_call():
    results = []
    ask = lambda i: results.append(math_reward(rf"\boxed{{(x+{i})^2}}", f"x^2+{2 * i}x+{i * i}"))  # noqa: E731
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1.0] * 8


def test_load_reward():
    assert load_reward("math") is math_reward
    assert load_reward("math:isqrt")(16) == 4
    for name in ("maths", "no_such_module:f", "math:nothing", "math:pi", ":f", "math:"):
        with pytest.raises(BadArgument, match=r"data\.reward"):
            load_reward(name)


def rollout(text, answer="4", finish="stop"):
    return Rollout(Prompt(Problem("p", "2+2?", answer), [1], [1]), 0, [2], [0.0], finish, 0, text)


def test_score_zeroes_what_is_cut_or_fails(caplog):
    def reward(response, answer):
        if response == "bad":
            raise KeyError("x")
        return {"high": 2.0, "nan": float("nan")}.get(response, 0.5)

    batch = [rollout("fine"), rollout("fine", finish="length"), rollout("bad"), rollout("high"), rollout("nan")]
    with caplog.at_level(logging.WARNING):
        assert score(batch, reward) == [0.5, 0.0, 0.0, 0.0, 0.0]
    assert len(caplog.records) == 1 and "3 of 5 responses" in caplog.text and "KeyError" in caplog.text
    assert score([rollout("\\boxed{4}"), rollout("5")], math_reward) == [1.0, 0.0]
