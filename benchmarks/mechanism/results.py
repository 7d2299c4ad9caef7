"""All numbers of the page from the dumps of each context: what __main__ writes as results.json."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.mechanism import analysis
from benchmarks.mechanism.columns import Columns, Key, columns, places
from benchmarks.mechanism.tokens import KINDS, ROLES
from megatron_egrsd.report.mechanism import measure
from megatron_egrsd.report.scored_dump import ScoredRollout

Dumps = dict[str, list[list[ScoredRollout]]]  # scored batches of each context of the teacher
REFERENCE = "template"  # the context that the others are compared with, if it is there
_LEAST = 0.01  # nats: of a smaller gap the sign says nothing (ours)
# Contexts whose difference is one more signal: what the first tells beyond the second.
CONTRASTS = {
    "template - other_solution": ("template", "other_solution"),
    "template - wrong_sibling": ("template", "wrong_sibling"),
    "sibling - wrong_sibling": ("sibling", "wrong_sibling"),
}


def results(dumps: Dumps, resamples: int) -> dict[str, Any]:
    """Compute every table; intervals are of `resamples` draws of problems."""
    figures = {name: asdict(measure(batches)) for name, batches in dumps.items()}  # refuses dumps without a teacher
    found = {name: columns(batches) for name, batches in dumps.items()}
    main = REFERENCE if REFERENCE in found else next(iter(found))
    reference = found[main]
    interval = _interval(resamples)
    return {
        "reference": main,
        "extent": {name: _extent(c) for name, c in found.items()},
        "figure_4": figures,
        "kinds": {name: _kinds(c) for name, c in found.items()},
        "style": _style(found, main, interval),
        "position": {"gap": _prediction(np.abs(reference.delta), reference, interval)}
        | _content(found, main, interval)
        | {"agreement": _agreement(reference, interval)},
    }


Interval = Callable[[np.ndarray, analysis.Statistic], dict[str, dict[str, float]]]


def _interval(resamples: int) -> Interval:
    return lambda problem, statistic: analysis.bootstrap(problem, statistic, resamples)


def _extent(c: Columns) -> dict[str, float]:
    return {
        "problems": len(np.unique(c.problem)),
        "responses": len(c.keys),
        "tokens": len(c.delta),
        "right": int(c.right.sum()),
        "gap": float(np.abs(c.delta).mean()),
        "delta": float(c.delta.mean()),
        "entropy": float(c.entropy.mean()),
    }


def _kinds(c: Columns) -> dict[str, dict[str, float]]:
    """Return for each kind of token its share, mean Hhat and gates, and its part of all that the gates take away."""
    means = {"normalized": c.normalized, "gate": c.gate, "looking_gate": c.looking_gate}
    rows = analysis.by_class(c.kind, KINDS, means)
    for name, gate in (("closed", c.gate), ("looking_closed", c.looking_gate)):
        for kind, part in analysis.parts(1 - gate, c.kind, KINDS).items():
            rows[kind][name] = part
    return rows


def _style(found: dict[str, Columns], main: str, interval: Interval) -> dict[str, Any]:
    """Compare style with task in every context and contrast, beside the reference on the same responses."""
    signals = {name: (c.keys, c.delta) for name, c in found.items()}
    for name, pair in CONTRASTS.items():
        if keys := _shared(*(found[context].keys if context in found else [] for context in pair)):
            first, second = (found[context].delta[places(found[context].keys, keys)] for context in pair)
            signals[name] = keys, first - second
    rows, base = {}, found[main]
    for name, (keys, delta) in signals.items():
        if not (shared := _shared(keys, base.keys)):
            continue
        at, own = places(base.keys, shared), delta[places(keys, shared)]
        rows[name] = {"responses": len(shared), "correlation": analysis.correlation(own, base.delta[at])}
        rows[name] |= interval(base.problem[at], _beside(own, base.delta[at], base.role[at]))
    return rows


def _beside(own: np.ndarray, reference: np.ndarray, role: np.ndarray) -> analysis.Statistic:
    """Compare style with task in `own`, and its parts of |delta| with the reference's on the same tokens."""

    def statistic(at: np.ndarray) -> dict[str, float]:
        found, beside = (analysis.style_against_task(delta[at], role[at], ROLES) for delta in (own, reference))
        return found | {f"more/{name}": found[f"gap/{name}"] - beside[f"gap/{name}"] for name in ("style", "task")}

    return statistic


def _shared(keys: list[Key], others: list[Key]) -> list[Key]:
    there = set(others)
    return [key for key in keys if key in there]


def _prediction(target: np.ndarray, c: Columns, interval: Interval) -> dict[str, Any]:
    """Compare position with entropy as predictors of `target` [T]."""

    def ranked(at: np.ndarray) -> dict[str, float]:
        found = analysis.correlations(target[at], c.position[at], c.entropy[at])
        return found | {"|entropy| - |position|": abs(found["entropy"]) - abs(found["position"])}

    return {
        "spearman": interval(c.problem, ranked),
        "r2": interval(c.problem, analysis.predicted(target, c.position, c.entropy, c.problem)),
        "by position": analysis.curve(target, c.position),
        "by entropy": analysis.curve(target, c.entropy),
    }


def _content(found: dict[str, Columns], main: str, interval: Interval) -> dict[str, Any]:
    """Return the same of |delta - delta under another problem's solution|: the effect of content, not of presence."""
    if "other_solution" not in found:
        return {}
    c, other = found[main], found["other_solution"]
    if c.keys != other.keys:  # a prompt with another solution did not fit
        return {}
    return {"content": _prediction(np.abs(c.delta - other.delta), c, interval)}


def _agreement(c: Columns, interval: Interval) -> dict[str, Any]:
    right = np.repeat(c.right, c.lengths)
    signed = c.direction * c.delta

    def statistic(at: np.ndarray) -> dict[str, float]:
        return analysis.agreement(signed[at], c.position[at], c.entropy[at], right[at], _LEAST)

    return interval(c.problem, statistic)
