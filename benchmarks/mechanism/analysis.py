"""The statistics of the page, as pure functions of arrays over tokens, with intervals by bootstrap over problems."""

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

Statistic = Callable[[np.ndarray], dict[str, float]]  # of the tokens at these places

_BINS = 10
_FOLDS = 5


def bootstrap(problem: np.ndarray, statistic: Statistic, resamples: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return {name: {value, low, high}} of `statistic`, with 95 % percentile intervals over resampled problems.

    Whole problems are drawn, because the tokens of a response, and the responses to a problem, are alike. `problem` [T]
    numbers them. A draw in which a number is undefined (NaN) does not count for it. One problem alone has no bounds.
    """
    order = np.argsort(problem, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(problem[order])) + 1)
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples if len(members) > 1 else 0):
        drawn = random.integers(len(members), size=len(members))
        draws.append(statistic(np.concatenate([members[i] for i in drawn])))
    found = {}
    for name, value in statistic(order).items():
        sample = np.array([draw[name] for draw in draws])
        sample = sample[np.isfinite(sample)]
        low, high = np.quantile(sample, [0.025, 0.975]) if len(sample) else (np.nan, np.nan)
        found[name] = {"value": value, "low": float(low), "high": float(high)}
    return found


def by_class(classes: np.ndarray, names: tuple[str, ...], means: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return each class's share of the tokens and means of `means` [T]; `classes` [T] are indices into `names`."""
    return {name: class_means(classes == i, means) for i, name in enumerate(names)}


def class_means(here: np.ndarray, means: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the share of the tokens `here` [T] bool, and means over them."""
    return {"share": float(here.mean())} | {name: _mean(values[here]) for name, values in means.items()}


def parts(values: np.ndarray, classes: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Return the part of the sum of `values` [T] >= 0 that each class has."""
    total = values.sum()
    sums = np.bincount(classes, values, minlength=len(names))
    return {name: float(part / total) if total else np.nan for name, part in zip(names, sums, strict=True)}


def style_against_task(delta: np.ndarray, role: np.ndarray, roles: tuple[str, ...]) -> dict[str, float]:
    """Return parts of tokens and of sum |delta| by role, means of |delta|, and the ratio of style's to task's."""
    size = np.abs(delta)
    found = {f"tokens/{name}": part for name, part in parts(np.ones(len(role)), role, roles).items()}
    found |= {f"gap/{name}": part for name, part in parts(size, role, roles).items()}
    means = {name: _mean(size[role == i]) for i, name in enumerate(roles)}
    found |= {f"mean/{name}": value for name, value in means.items()}
    return found | {"ratio": means["style"] / means["task"] if means["task"] else np.nan}


def correlations(target: np.ndarray, position: np.ndarray, entropy: np.ndarray) -> dict[str, float]:
    """Return Spearman's correlations of `target` with position and entropy, and the partial ones given the other.

    All arrays are [T]. NaN if an array is constant.
    """
    ranks = np.stack([rankdata(x) for x in (target, position, entropy)])
    if (ranks.std(1) == 0).any():
        return dict.fromkeys(("position", "entropy", "position given entropy", "entropy given position"), np.nan)
    (_, p, e), (_, _, pe), _ = np.corrcoef(ranks)
    return {
        "position": float(p),
        "entropy": float(e),
        "position given entropy": _partial(p, e, pe),
        "entropy given position": _partial(e, p, pe),
    }


def _partial(own: float, other: float, between: float) -> float:
    rest = (1 - other**2) * (1 - between**2)
    return float((own - other * between) / np.sqrt(rest)) if rest > 0 else np.nan


def predicted(target: np.ndarray, position: np.ndarray, entropy: np.ndarray, problem: np.ndarray) -> Statistic:
    """Return the share R^2 of the ranks of `target` that position, entropy and both explain on problems not fitted.

    A predictor enters as its decile, a step function, so that any shape counts, not only a monotone one; both together
    are the sum of two. Problems are dealt into five folds, and each fold is predicted by the least squares of the rest.
    Returns the statistic of the out-of-fold errors; the fits stay as they are when it is bootstrapped.
    """
    ranks = rankdata(target) / len(target)
    steps = {"position": _deciles(position), "entropy": _deciles(entropy)}
    steps["both"] = np.hstack(list(steps.values()))
    fold = np.unique(problem, return_inverse=True)[1] % _FOLDS
    constant = np.ones((len(ranks), 1))
    base = _errors(constant, ranks, fold)
    errors = {name: _errors(x, ranks, fold) for name, x in steps.items()}

    def statistic(places: np.ndarray) -> dict[str, float]:
        total = base[places].sum()
        found = {n: float(1 - e[places].sum() / total) if total else np.nan for n, e in errors.items()}
        return found | {"entropy - position": found["entropy"] - found["position"]}

    return statistic


def _deciles(values: np.ndarray) -> np.ndarray:
    """Return [T, bins] indicators of the deciles of `values` [T]; equal values share one, so there may be fewer."""
    inner = np.unique(np.quantile(values, np.arange(1, _BINS) / _BINS))
    return np.eye(len(inner) + 1)[np.searchsorted(inner, values, side="right")]


def _errors(x: np.ndarray, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Return [T] squared errors of the least squares of y on x, each fold by the others; a single fold by itself."""
    errors = np.empty(len(y))
    for number in np.unique(fold):
        held = fold == number
        rest = ~held if not held.all() else held
        errors[held] = (y[held] - x[held] @ np.linalg.lstsq(x[rest], y[rest], rcond=None)[0]) ** 2
    return errors


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a positive scores higher than a negative, ties counted half; NaN without either."""
    count, ranks = int(positive.sum()), rankdata(score)
    others = len(positive) - count
    if not count or not others:
        return np.nan
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def agreement(
    signed: np.ndarray, position: np.ndarray, entropy: np.ndarray, right: np.ndarray, least: float
) -> dict[str, float]:
    """Measure how position and entropy tell tokens whose gap and reward agree, `signed` = D delta > 0, from others.

    Only tokens with |delta| > `least` count: of smaller gaps the sign says nothing. Of right responses ([T] bool), of
    wrong ones, and of all: the share that agrees, and the areas under the ROC curve of position and of entropy (above
    0.5: later, or more uncertain, tokens agree more).
    """
    found = {}
    for name, among in (("all", np.ones(len(right), bool)), ("right", right), ("wrong", ~right)):
        here = among & (np.abs(signed) > least)
        agrees = signed[here] > 0
        found[f"{name}/agree"] = _mean(agrees)
        found[f"{name}/position"] = auroc(position[here], agrees)
        found[f"{name}/entropy"] = auroc(entropy[here], agrees)
    return found


def curve(values: np.ndarray, along: np.ndarray) -> list[float]:
    """Return the means of `values` [T] in ten groups of equal size, ordered by `along` [T]."""
    return [_mean(values[of]) for of in np.array_split(np.argsort(along, kind="stable"), _BINS)]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation; NaN if an array is constant or there are fewer than two values."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() and b.std() else np.nan


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else np.nan
