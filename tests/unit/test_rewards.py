"""The verifier on hostile strings and from many threads; the worker behind it; a user's reward."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.rewards import verifier
from megatron_egrsd.rewards.reward import WORKERS, decode_and_grade, grade, load_reward, math_reward


def test_plain_numbers_are_fast_and_never_start_math_verify(monkeypatch):
    monkeypatch.setattr(verifier._worker, "ask", None)
    start = time.perf_counter()
    for i in range(2000):
        assert math_reward(str(i), "42") == float(i == 42)
    assert time.perf_counter() - start < 4  # 0.2 s on an idle core


@pytest.mark.parametrize(
    "bomb",
    [
        "10^{10^{10^{10}}}",
        "99999999!",
        "9^{9^{9^{9}}}",
        ",".join(f"{i}^{{9^{{9^{{9}}}}}}" for i in range(2, 20)),
    ],
)
@pytest.mark.heavy
def test_a_computation_without_end_scores_zero_in_time(bomb):
    start = time.perf_counter()
    gold = ",".join(f"x+{i}" for i in range(bomb.count(",") + 1))
    assert math_reward(f"\\boxed{{{bomb}}}", gold) == 0.0
    assert time.perf_counter() - start < 50  # five CPU seconds, however busy the machine
    assert math_reward(r"\boxed{(x+2)^2}", "x^2+4x+4") == 1.0


@pytest.mark.heavy
def test_a_worker_that_is_killed_is_replaced():
    assert math_reward(r"\boxed{(x+3)^2}", "x^2+6x+9") == 1.0
    first = verifier._worker.process
    with pytest.raises(verifier.GaveUp):
        verifier.algebra_equal("x+5", "10^{10^{10^{10}}}")
    assert first.returncode is not None  # ended, and reaped
    assert math_reward(r"\boxed{(x+4)^2}", "x^2+8x+16") == 1.0
    assert verifier._worker.process.pid != first.pid
    verifier._worker.process.kill()  # from outside, between two answers
    verifier._worker.process.wait()
    assert math_reward(r"\boxed{(x+5)^2}", "x^2+10x+25") == 1.0


@pytest.mark.heavy
@pytest.mark.timeout(200)
def test_hostile_strings():
    """None raises, is right, or takes for ever: all took 15 s together on an idle core."""
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
        "\\(" * 50_000,
        "\\text{" + " " * 100_000,
        "\\boxed{1}\\text{" + " " * 100_000 + "\\boxed{2}",
        "\\{" * 190 + "1" + "\\}" * 190,
        "(" * 199 + "1" + ")" * 199,
        "#### " * 50_000,
        "a=" * 190,
        "1:" * 190,
        "1,x" * 130,
        "\\pm" * 130,
    ]:
        assert math_reward(text, "5") == 0.0
        assert math_reward("\\boxed{5}", text) == 0.0


PIECES = st.sampled_from(
    [
        *"0123456789+-*/^_=<>()[]{},.;:!|%$&~ xyiabnCAT\n−π∞√°±≤×",
        *[
            r"\frac",
            r"\sqrt",
            r"\pi",
            r"\text{",
            r"\boxed{",
            r"\left(",
            r"\right)",
            r"\pm",
            r"\cdot",
            r"\infty",
            r"\cup",
            r"\\",
            r"\{",
            r"\}",
            r"\%",
            r"\$",
            r"\circ",
            r"\sin",
            r"\log",
        ],
        *[
            r"\sum",
            r"\int",
            r"\begin{pmatrix}",
            r"\end{pmatrix}",
            r"p.m.",
            r"10^",
            r"9e9",
            r"####",
            r"A:",
            r"answer",
            r"</think>",
            r"<think>",
        ],
        *(" and ", " or ", " is "),
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.text(max_size=80) | st.lists(PIECES, max_size=40).map("".join),
    st.sampled_from(["5", r"\frac{1}{2}", "#### 18", "", "x+1", "(1, 2]", r"\{1, \sqrt{2}\}", "3:1", "y=2x"]),
)
@pytest.mark.heavy
def test_no_text_raises_or_hangs(response, answer):
    start = time.perf_counter()
    for text in (response, f"\\boxed{{{response}}}"):
        assert math_reward(text, answer) in (0.0, 1.0)
        assert math_reward("\\boxed{5}", text) in (0.0, 1.0)
    assert time.perf_counter() - start < 100  # four comparisons of five CPU seconds on a machine that is busy


@pytest.mark.heavy
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
    assert load_reward("operator:eq")("a", "a") == 1.0
    for name in ("maths", "no_such_module:f", "math:nothing", "math:pi", ":f", "math:"):
        with pytest.raises(BadArgument, match=r"data\.reward"):
            load_reward(name)


def test_a_file_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    """It can also import it in the worker process that calls the function."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "compared_for_a_test.py").write_text("def same(a, b):\n    return a == b\n")
    call = "def reward(response, answer):\n    return float(same(response, answer))\n"
    (tmp_path / "mine.py").write_text(f"from compared_for_a_test import same\n{call}")
    reward = load_reward(f"{tmp_path}/mine.py:reward")
    assert (reward("a", "a"), reward("a", "b")) == (1.0, 0.0)


def test_what_is_cut_or_fails_counts_as_zero():
    def reward(response, answer):
        if response == "bad":
            raise KeyError("x")
        return {"high": 2.0, "nan": float("nan")}.get(response, 0.5)

    assert grade("fine", "4", "stop", reward) == (0.5, "")
    assert grade("fine", "4", "length", reward) == (0.0, "")
    assert grade("bad", "4", "stop", reward) == (0.0, "KeyError: 'x'")
    assert grade("high", "4", "stop", reward) == (0.0, "it returned 2.0, outside [0, 1]")
    assert grade("nan", "4", "stop", reward) == (0.0, "it returned nan, outside [0, 1]")
    assert [grade(text, "4", "stop", math_reward)[0] for text in ("\\boxed{4}", "5")] == [1.0, 0.0]


def hostile_reward(response, answer):
    if response == "hang":
        time.sleep(600)
    if response == "exit":
        os._exit(3)
    if response == "fill":
        raise MemoryError("no room")
    return float(response == answer)


@pytest.mark.heavy
def test_a_users_reward_can_neither_hang_nor_end_the_run():
    reward = load_reward("tests.unit.test_rewards:hostile_reward", timeout=3.0)
    texts = ("4", "hang", "5", "exit", "fill", "4", "hang", "4")
    with ThreadPoolExecutor(WORKERS) as threads:
        grades = list(threads.map(lambda text: grade(text, "4", "stop", reward), texts))
    assert [value for value, _ in grades] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    reasons = [error for _, error in grades]
    assert [bool(reason) for reason in reasons] == [False, True, False, True, True, False, True, False]
    assert "data.reward_timeout = 3 s" in reasons[1] and "MemoryError: no room" in reasons[4]


def test_the_tags_of_thinking_stay_in_the_text_of_a_tokenizer_that_calls_them_special():
    class Tokenizer:
        all_special_tokens = ("<eos>", "<think>", "</think>")
        words = ("<eos>", "<think>", "</think>", r"\boxed{4}", r"\boxed{5}")

        def convert_tokens_to_ids(self, tokens):
            return [self.words.index(token) for token in tokens]

        def decode(self, ids, skip_special_tokens):
            return "".join(self.words[i] for i in ids if self.words[i] not in self.all_special_tokens)

    text, value, _ = decode_and_grade(Tokenizer(), [1, 4, 2, 3, 0], "4", "stop", math_reward)
    assert (text, value) == (r"<think>\boxed{5}</think>\boxed{4}", 1.0)
    assert decode_and_grade(Tokenizer(), [1, 3, 0], "4", "stop", math_reward)[1] == 0.0
