"""Paired comparisons by seed: mean difference, its interval, an exact sign-flip test, Holm's correction."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """Difference of n pairs. `low` and `high` bound the 95 % t interval, `low90` and `high90` 90 %; p is two-sided."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float
    low90: float
    high90: float
    p: float

    def within(self, margin: float) -> bool:
        """Return whether the 90 % interval lies inside (-margin, margin): two one-sided t tests at 5 %."""
        return -margin < self.low90 and self.high90 < margin


def difference(pairs: np.ndarray) -> Difference:
    """Return the statistics of pairwise differences [n], n >= 2."""
    n, mean, deviation = len(pairs), float(np.mean(pairs)), float(np.std(pairs, ddof=1))
    error = deviation / np.sqrt(n)
    wide, narrow = (error * stats.t.ppf(q, n - 1) for q in (0.975, 0.95))
    return Difference(n, mean, deviation, mean - wide, mean + wide, mean - narrow, mean + narrow, sign_flip(pairs))


def sign_flip(pairs: np.ndarray) -> float:
    """Return the exact two-sided p of the mean if each difference may as well have the other sign (R. A. Fisher, 1935).

    All 2^n sign vectors are enumerated: n is at most 20. The smallest p there is, is 2 / 2^n.
    """
    if len(pairs) > 20:
        raise ValueError(f"{len(pairs)} pairs are too many to enumerate all signs; at most 20")
    signs = np.array(list(product((1.0, -1.0), repeat=len(pairs) - 1)))  # the rest is symmetric
    sums = np.abs(np.c_[np.ones(len(signs)), signs] @ pairs)
    return float(np.mean(sums >= abs(np.sum(pairs)) * (1 - 1e-12)))


def holm(p_values: list[float]) -> list[float]:
    """Return S. Holm's step-down adjusted p-values (Scand. J. Statist. 6 (1979), 65-70), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted
