"""Ours beside the paper's: the numbers of every table, each with its interval, from the finished cells.

With several seeds the interval is Student's t over them. With one it is a bootstrap over the problems, each set
resampled by itself: it holds for this training run, and knows nothing of how another run would differ.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from scipy.stats import ttest_1samp

from benchmarks.reproduce_paper.cells import Cell, Setting, Table
from benchmarks.reproduce_paper.published import COLUMNS
from benchmarks.reproduce_paper.site import Site
from megatron_egrsd.data.samples import is_right
from megatron_egrsd.evaluation.protocol import SETS, summary_columns
from megatron_egrsd.evaluation.summary import LEVEL, RESAMPLES, resamples_of


@dataclass(frozen=True)
class Value:
    """A number and its 95 % interval; None if one problem, or one seed, gives none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Number:
    """A number of a table: ours from `seeds` runs, None if there is none yet, and the paper's, None if it has none."""

    ours: Value | None
    paper: float | None
    seeds: int

    @property
    def difference(self) -> Value | None:
        """Ours minus the paper's. The interval is ours alone: the paper publishes none of its own."""
        if self.ours is None or self.paper is None:
            return None
        low, high = (None if end is None else end - self.paper for end in (self.ours.low, self.ours.high))
        return Value(self.ours.value - self.paper, low, high)

    @property
    def differs(self) -> bool:
        """Return whether the interval leaves out the paper's number."""
        found = self.difference
        return found is not None and found.low is not None and not found.low <= 0 <= found.high


def begun(setting: Setting, site: Site) -> list[Cell]:
    """Return the setting's cells that have a directory, in the order of their seeds."""
    directories = (site.output / "cells" / setting.key).glob("seed-*")
    return [Cell(setting, seed) for seed in sorted(int(path.name.removeprefix("seed-")) for path in directories)]


def finished(setting: Setting, site: Site) -> list[Cell]:
    """Return the setting's finished cells, in the order of their seeds."""
    return [cell for cell in begun(setting, site) if site.is_finished(cell)]


def values_of(setting: Setting, site: Site) -> tuple[dict[str, Value], int]:
    """Return our value of each column that can be computed, and from how many seeds."""
    cells = finished(setting, site)
    if not cells:
        return {}, 0
    runs = [of_evaluation(site.evaluation_of(cell)) for cell in cells]
    if len(runs) == 1:
        return runs[0], 1
    common = [column for column in COLUMNS if all(column in run for run in runs)]
    return {column: _over_seeds([run[column].value for run in runs]) for column in common}, len(runs)


@functools.cache
def of_evaluation(directory: Path) -> dict[str, Value]:
    """Return the columns of a finished evaluation with intervals over its problems; summaries only if it has all sets.

    It is read once: its samples hold every response.
    """
    sets = json.loads((directory / "results.json").read_text(encoding="utf-8"))["sets"]
    found = {}
    for name in SETS:
        if name in sets:
            accuracy = sets[name]["accuracy"]
            ends = (accuracy.get(key) for key in ("value", "low", "high"))
            found[name] = Value(*(None if end is None else 100 * end for end in ends))
    if len(found) < len(SETS):
        return found
    return found | _summaries(_problems(directory / "samples.jsonl", {name: sets[name]["k"] for name in SETS}))


def _problems(path: Path, k: dict[str, int]) -> dict[str, np.ndarray]:
    """Return [problems, 2] of each set: the share of right samples in per cent, and their mean length in tokens."""
    rows: dict[str, dict[str, list[tuple[float, int]]]] = {name: {} for name in k}
    with path.open("rb") as file:
        next(file)  # the settings
        for line in file:
            row = orjson.loads(line)
            if row["set"] in k and row["index"] < k[row["set"]]:
                samples = rows[row["set"]].setdefault(row["id"], [])
                samples.append((100.0 * is_right(row["reward"]), row["tokens"]))
    return {name: np.array([np.mean(samples, axis=0) for samples in found.values()]) for name, found in rows.items()}


def _summaries(problems: dict[str, np.ndarray]) -> dict[str, Value]:
    """Return Avg, AvgLen and Eff with percentile intervals over resampled problems, the sets independent."""
    means = [found.mean(axis=0) for found in problems.values()]
    values = summary_columns([float(a) for a, _ in means], [float(n) for _, n in means])
    names = ("avg", "avg_len", "eff")
    if any(len(found) < 2 for found in problems.values()):
        return {name: Value(value) for name, value in zip(names, values, strict=True)}
    resampled = np.zeros((RESAMPLES, 2))
    for seed, found in enumerate(problems.values()):  # with one seed sets of 30 problems would be resampled alike
        resampled += resamples_of(len(found), seed) @ found / len(found) / len(problems)
    accuracy, length = resampled.T
    tail = 50 * (1 - LEVEL)
    intervals = (np.percentile(column, [tail, 100 - tail]) for column in (accuracy, length, 1000 * accuracy / length))
    return {
        name: Value(value, float(low), float(high))
        for name, value, (low, high) in zip(names, values, intervals, strict=True)
    }


def _over_seeds(values: Sequence[float]) -> Value:
    low, high = ttest_1samp(values, 0).confidence_interval(LEVEL)
    return Value(float(np.mean(values)), float(low), float(high))


def fill(tables: Sequence[Table], site: Site) -> dict[str, list[dict[str, Number]]]:
    """Return the numbers of each table by its key: a dictionary of columns for each row."""
    ours = {row.setting: values_of(row.setting, site) for table in tables for row in table.rows}
    return {
        table.key: [
            {c: Number(ours[row.setting][0].get(c), row.paper.get(c), ours[row.setting][1]) for c in table.columns}
            for row in table.rows
        ]
        for table in tables
    }
