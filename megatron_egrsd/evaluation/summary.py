"""Summary of graded samples: accuracy, pass@k, majority@k and lengths, with bootstrap intervals over problems."""

import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from megatron_egrsd.data.samples import Rollout

RESAMPLES = 10_000
LEVEL = 0.95  # confidence level of the intervals


@dataclass(frozen=True)
class GradedResponse:
    """One graded response.

    `length` is its number of tokens, `thinking` the number up to </think>. `states_answer` is true if the response was
    finished and marks an answer. `vote` is its normalised answer for majority@k, empty if it has none.
    """

    problem: Hashable
    right: bool
    length: int
    truncated: bool
    thinking: int = 0
    states_answer: bool = False
    vote: str = ""


@dataclass(frozen=True)
class Estimate:
    """A number and, if there is more than one problem, its 95 % bootstrap interval over problems."""

    value: float
    low: float | None = None
    high: float | None = None


def summarize(samples: list[GradedResponse], seed: int = 0) -> dict[str, Estimate]:
    """Compute every number of the table (docs/guides/evaluation.md); lengths in tokens, shares in [0, 1].

    The length of right (wrong) answers is missing if there are none. `seed` determines the resamples.
    """
    groups = by_problem(samples)
    k = min(map(len, groups))
    resamples = resamples_of(len(groups), seed)

    def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> Estimate:
        return _ratio(np.fromiter(numerators, float), np.fromiter(denominators, float), resamples)

    def mean(values: Iterable[float]) -> Estimate:
        return ratio(values, [1.0] * len(groups))

    def share(chosen: list[list[bool]]) -> Estimate:
        return ratio(map(sum, chosen), map(len, chosen))

    result = {"accuracy": accuracy(groups, resamples)}
    for n in sorted({2**i for i in range(1, k.bit_length())} | ({k} if k > 1 else set())):
        result[f"pass@{n}"] = mean(pass_at_k(len(g), sum(s.right for s in g), n) for g in groups)
    result[f"majority@{k}"] = mean(map(majority, groups))
    result["truncated"] = share([[s.truncated for s in g] for g in groups])
    result["states_answer"] = share([[s.states_answer for s in g] for g in groups])
    parts = {
        "length": (lambda s: s.length, lambda s: True),
        "length/right": (lambda s: s.length, lambda s: s.right),
        "length/wrong": (lambda s: s.length, lambda s: not s.right),
        "thinking": (lambda s: s.thinking, lambda s: True),
        "answer": (lambda s: s.length - s.thinking, lambda s: True),
    }
    for name, (tokens, counts) in parts.items():
        chosen = [[tokens(s) for s in g if counts(s)] for g in groups]
        every = [n for lengths in chosen for n in lengths]
        if every:
            result[f"{name}/mean"] = ratio(map(sum, chosen), map(len, chosen))
            result[f"{name}/median"] = Estimate(float(np.median(every)))
            result[f"{name}/p95"] = Estimate(percentile_95(every))
    return result


def accuracy(groups: list[list[GradedResponse]], resamples: np.ndarray | None) -> Estimate:
    """Compute avg@k: the mean over the problems of the share of right samples."""
    shares = np.array([sum(s.right for s in g) / len(g) for g in groups])
    return _ratio(shares, np.ones(len(shares)), resamples)


def change_of_accuracy(first: dict[str, Any], last: dict[str, Any]) -> dict[str, float]:
    """Return the 95 % interval of the change of avg@k from evaluation `first` to `last`, paired by problem.

    Both are what `summarize_rollouts` returns; {} if `right` is missing, of one problem, or of other numbers.
    Problems differ more from each other than before from after, so it is narrower than both accuracies' intervals say.
    """
    before, after = (np.array(evaluation.get("right", ())) for evaluation in (first, last))
    if before.shape != after.shape or len(after) < 2:
        return {}
    change = after / last["k"] - before / first["k"]
    estimate = _ratio(change, np.ones(len(change)), resamples_of(len(change), seed=0))
    return {"accuracy/change/low": estimate.low, "accuracy/change/high": estimate.high}


def by_problem(samples: list[GradedResponse]) -> list[list[GradedResponse]]:
    """Group the samples by problem, in the order in which the problems first appear."""
    groups: dict[Hashable, list[GradedResponse]] = {}
    for s in samples:
        groups.setdefault(s.problem, []).append(s)
    return list(groups.values())


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the probability that k of n samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), equation 1; c is `right`.
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def majority(samples: list[GradedResponse]) -> float:
    """Return the probability that the most frequent answer is right, ties broken at random.

    Samples without an answer do not vote. All right samples count as one answer: the verifier finds their answers equal
    in any spelling.
    """
    votes = Counter("" if s.right else s.vote for s in samples if s.right or s.vote)
    leaders = [vote for vote, n in votes.items() if n == max(votes.values())]
    return ("" in leaders) / len(leaders) if leaders else 0.0


def percentile_95(values: Sequence[float]) -> float:
    """Return the 95th percentile, as one of the values."""
    return float(np.percentile(values, 95, method="nearest"))


def resamples_of(problems: int, seed: int) -> np.ndarray | None:
    """Count how often each resample draws each problem: [RESAMPLES, problems] fp32, or None for one problem."""
    if problems < 2:
        return None
    draws = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), RESAMPLES)
    return draws.astype(np.float32)  # counts are exact in fp32


def _ratio(numerators: np.ndarray, denominators: np.ndarray, resamples: np.ndarray | None) -> Estimate:
    """Estimate sum(numerators) / sum(denominators) over problems, with the percentile interval of its resamples."""
    value = float(numerators.sum() / denominators.sum())
    if resamples is None:
        return Estimate(value)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (resamples @ numerators) / (resamples @ denominators)  # fp64, like the numerators
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])  # nan: a resample without, say, a wrong answer
    return Estimate(value, float(low), float(high))


def summarize_rollouts(rollouts: list[Rollout]) -> dict[str, Any]:
    """Compute avg@k with its 95 % interval, pass@k, response length in tokens and the share of truncated responses.

    `right` is the number of right responses of each problem, in the order of the problems.
    """
    samples = [
        GradedResponse(r.group, r.right, len(r.response_ids), r.finish_reason == "length")
        for r in sorted(rollouts, key=lambda r: r.group)
    ]
    groups = by_problem(samples)
    lengths = [s.length for s in samples]
    estimate = accuracy(groups, resamples_of(len(groups), seed=0))
    interval = {} if estimate.low is None else {"accuracy/low": estimate.low, "accuracy/high": estimate.high}
    return interval | {
        "accuracy": estimate.value,
        "pass": statistics.fmean(any(s.right for s in group) for group in groups),
        "length/mean": statistics.fmean(lengths),
        "length/median": statistics.median(lengths),
        "length/p95": percentile_95(lengths),
        "truncated": statistics.fmean(s.truncated for s in samples),
        "k": len(samples) / len(groups),
        "problems": len(groups),
        "right": [sum(s.right for s in group) for group in groups],
    }
