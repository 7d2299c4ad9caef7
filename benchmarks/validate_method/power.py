"""The number of seeds: differences in held-out accuracy that the plan resolves, by the spread of the former study.

A comparison resolves a difference if the chance to find it is POWER at the first, strictest step of Holm's correction
over its family. Calculated for the paired t test; the exact sign-flip test of paired.py also has a smallest p, which
`pairs_for` respects.
"""

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from benchmarks.measure import table
from benchmarks.validate_method.hypotheses import DOUBTING, EVALUATED, MARGIN, Comparison, comparisons, settings

FORMER = Path("docs/measurements/results_0_1_0_runs.csv")
_FORMER_RESPONSES = 8  # held-out responses to each problem there
_PROBLEMS = 128
LEVEL, POWER = 0.05, 0.8


def power(effect: float, deviation: float, pairs: int, level: float) -> float:
    """Return the chance that the two-sided paired t test at `level` finds a mean difference of `effect`."""
    limit, shift = stats.t.ppf(1 - level / 2, pairs - 1), effect / deviation * np.sqrt(pairs)
    other_sign = np.nan_to_num(stats.nct.cdf(-limit, pairs - 1, shift))  # NaN if it is too small for a float
    return float(stats.nct.sf(limit, pairs - 1, shift) + other_sign)


def resolved(deviation: float, pairs: int, level: float) -> float:
    """Return the difference that is found with a chance of POWER."""
    return deviation * brentq(lambda effect: power(effect, 1.0, pairs, level) - POWER, 0.0, 50.0)


def pairs_for(effect: float, deviation: float, level: float) -> int:
    """Return the fewest pairs that find `effect` with a chance of POWER, and whose smallest exact p allows it."""
    pairs = 3
    while power(effect, deviation, pairs, level) < POWER or 2.0 ** (1 - pairs) > level:
        pairs += 1
    return pairs


@dataclass(frozen=True)
class Spread:
    """Standard deviation of paired differences of held-out accuracy: as measured, and as predicted for EVALUATED."""

    measured: float
    predicted: float


def spread(path: Path, task: str) -> Spread:
    """Read the former study's runs on `task`, and pool the variances of the differences of all pairs of its settings.

    Both runs of a pair have the sampling variance p (1 - p) / (problems x responses) of their evaluation. It is what
    more responses to a problem reduce; that some problems are harder than others makes it smaller than this.
    """
    accuracy: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["setting"].startswith(f"{task}/"):
                accuracy.setdefault(row["setting"], {})[int(row["seed"])] = float(row["accuracy"])
    squares, freedom = 0.0, 0
    for one, other in itertools.combinations(accuracy.values(), 2):
        shared = sorted(one.keys() & other.keys())
        squares += (len(shared) - 1) * np.var([one[s] - other[s] for s in shared], ddof=1)
        freedom += len(shared) - 1
    mean = np.mean([value for seeds in accuracy.values() for value in seeds.values()])
    sampling = 2 * mean * (1 - mean) / _PROBLEMS
    variance = squares / freedom
    predicted = variance - sampling / _FORMER_RESPONSES + sampling / EVALUATED
    return Spread(float(np.sqrt(variance)), float(np.sqrt(predicted)))


def powers(former: Path = FORMER) -> str:
    """Return a table: by family of comparisons, the difference that its pairs resolve, and the pairs for MARGIN.

    A last line counts the runs of the plan, and those with which every family would resolve MARGIN.
    """
    families: dict[str, list[Comparison]] = {}
    for comparison in comparisons():
        families.setdefault(comparison.family, []).append(comparison)
    seeds = {s.name: s.seeds for s in settings()}
    enough = dict.fromkeys(seeds, 0)
    rows = []
    for family, members in families.items():
        found = spread(former, "doubting" if members[0].treatment.startswith(DOUBTING) else "tiny")
        sides = {side for c in members for side in (c.treatment, c.control)}
        pairs = min(seeds[side] for side in sides)
        level = LEVEL / len(members)
        needed = [pairs_for(MARGIN, deviation, level) for deviation in (found.measured, found.predicted)]
        enough |= {side: max(enough[side], needed[1]) for side in sides}
        rows.append([
            family, len(members), pairs, f"{found.measured:.4f}", f"{found.predicted:.4f}",
            f"{resolved(found.predicted, pairs, level):.3f}", *needed,
        ])  # fmt: skip
    needs = f"pairs for {MARGIN:.3f}"
    columns = ["hypothesis", "comparisons", "pairs", "spread then", f"predicted at avg@{EVALUATED}",
               "resolved by these pairs", f"{needs}, spread then", f"{needs}, predicted"]  # fmt: skip
    return (
        f"{table(columns, rows)}\n\n{sum(seeds.values())} runs; to resolve {MARGIN:.3f} everywhere would take "
        f"{sum(enough.values())} by the predicted spread."
    )
