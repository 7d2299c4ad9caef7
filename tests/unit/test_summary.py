"""The numbers of an evaluation against enumeration, and the coverage of their intervals."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from megatron_egrsd.evaluation.summary import (
    GradedResponse,
    change_of_accuracy,
    majority,
    pass_at_k,
    summarize,
    summarize_rollouts,
)
from megatron_egrsd.evaluation.table import evaluation_table
from tests.training import made_up_rollouts


def sample(problem, right, length=10, vote="", **more):
    return GradedResponse(problem, right, length, more.pop("truncated", False), vote=vote, **more)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample(n):
    for right in range(n + 1):
        outcomes = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            draws = [max(draw) for draw in combinations(outcomes, k)]
            assert pass_at_k(n, right, k) == pytest.approx(np.mean(draws))


def test_majority():
    right, wrong = sample("p", True, vote="1/2"), sample("p", False, vote="3")
    assert majority([right, right, wrong]) == 1
    assert majority([sample("p", True, vote="0.5"), sample("p", True, vote="1/2"), wrong]) == 1  # one answer
    assert majority([right, wrong, wrong]) == 0
    assert majority([right, wrong, sample("p", False, vote="4")]) == pytest.approx(1 / 3)  # a tie of three
    assert majority([sample("p", False), sample("p", False), right]) == 1  # without an answer, no vote
    assert majority([sample("p", False), sample("p", False)]) == 0


def test_summary_of_known_samples():
    samples = [
        sample("a", True, 4, thinking=3, states_answer=True),
        sample("a", True, 6, thinking=5, states_answer=True),
        sample("b", True, 8, thinking=0, states_answer=True),
        sample("b", False, 20, thinking=20, truncated=True),
    ]
    result = summarize(samples)
    values = {key: e.value for key, e in result.items()}
    assert values["accuracy"] == 0.75 and values["pass@2"] == 1 and values["majority@2"] == 1
    assert values["length/mean"] == 9.5 and values["length/right/mean"] == 6 and values["length/wrong/mean"] == 20
    assert values["length/median"] == 7 and values["length/p95"] == 20
    assert values["thinking/mean"] == 7 and values["answer/mean"] == 2.5
    assert values["truncated"] == 0.25 and values["states_answer"] == 0.75
    assert all(e.low <= e.value <= e.high for e in result.values() if e.low is not None)
    assert result["accuracy"].low == 0.5 and result["accuracy"].high == 1  # the resamples are aa, ab, ba, bb


def test_nothing_right_or_a_single_problem_or_a_single_sample():
    result = summarize([sample("a", False), sample("b", False)])
    assert "length/right/mean" not in result and result["length/wrong/mean"].value == 10
    assert result["accuracy"].value == result["majority@1"].value == 0 and "pass@2" not in result
    assert summarize([sample("a", True)])["accuracy"].low is None
    evaluation_table("title", {"one": result, "two": summarize([sample("a", True)])})


def test_the_seed_decides_the_interval():
    rng = np.random.default_rng(0)
    samples = [sample(p, bool(rng.random() < 0.4)) for p in range(50) for _ in range(4)]
    assert summarize(samples, seed=1) == summarize(samples, seed=1) != summarize(samples, seed=2)


def test_the_interval_of_a_change_is_that_of_the_paired_differences():
    rng, k = np.random.default_rng(0), 1000
    before = rng.integers(0, 800, 200)
    after = before + rng.integers(-50, 150, 200)
    change = change_of_accuracy({"right": before.tolist(), "k": 2 * k}, {"right": (2 * after).tolist(), "k": 4 * k})
    differences = (after - before) / (2 * k)
    expected = stats.t.interval(0.95, 199, loc=differences.mean(), scale=stats.sem(differences))
    assert tuple(change.values()) == pytest.approx(expected, abs=1e-4)
    same = {"right": before.tolist(), "k": k}
    assert change_of_accuracy(same, {"right": (before + 100).tolist(), "k": k}) == {
        "accuracy/change/low": pytest.approx(0.1),
        "accuracy/change/high": pytest.approx(0.1),
    }


@pytest.mark.parametrize("first", [{}, {"right": [1], "k": 8}, {"right": [1] * 3, "k": 8}])
def test_evaluations_of_other_problems_have_no_change(first):
    assert change_of_accuracy(first, {"right": [1] * 4, "k": 8}) == {}
    assert change_of_accuracy({"right": [1], "k": 8}, {"right": [2], "k": 8}) == {}


def test_right_responses_are_counted_in_the_order_of_the_problems():
    rollouts = made_up_rollouts()
    for order in (rollouts, rollouts[::-1]):
        assert summarize_rollouts(order)["right"] == [2, 2, 2, 0]


@pytest.mark.heavy
def test_the_interval_covers_the_truth():
    # Problems of different difficulty: the spread is between problems, as it is in a benchmark.
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        difficulty = rng.beta(1, 1, 60)
        samples = [sample(p, bool(rng.random() < difficulty[p])) for p in range(60) for _ in range(4)]
        accuracy = summarize(samples, seed=trial)["accuracy"]
        covered += accuracy.low <= 0.5 <= accuracy.high
    assert covered >= 88  # 95 expected; below 88 by chance in 1 of 300
