"""Reader of a run's output: its metrics, its evaluations, and its objective."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report.family import settings, title


@dataclass(frozen=True)
class Run:
    """A run: `steps` and `evaluations` are rows of metrics.jsonl in the order of their steps, the last of each step.

    A step has the keys of docs/reference/metrics.md, an evaluation those of summarize_rollouts, and both have "step".
    """

    name: str
    objective: str  # name and settings; empty if the run has no readable config.yaml
    steps: list[dict]
    evaluations: list[dict]


def read_runs(paths: list[Path]) -> list[Run]:
    """Read the runs in `paths`, named by the part of the path that differs. Raises BadArgument if one is no run."""
    resolved = [p.resolve() for p in paths]
    if len(set(resolved)) < len(resolved):
        raise BadArgument("the same run is given twice")
    depth = 1
    while len({p.parts[-depth:] for p in resolved}) < len(resolved):
        depth += 1
    return [read_run(path, "/".join(full.parts[-depth:])) for path, full in zip(paths, resolved, strict=True)]


def read_run(path: Path, name: str = "", begun: bool = True) -> Run:
    """Read the run in `path`. A last line that is still being written is left out.

    Raises BadArgument for a line that is no metrics, and if there is nothing to read, unless `begun` is False.
    """
    file = path / "metrics.jsonl"
    if not file.is_file() and not begun:
        return Run(name or path.resolve().name, _objective(path), [], [])
    if not file.is_file():
        raise BadArgument(f"{path} holds no metrics.jsonl; give the directory of a run (the `output` of its config)")
    steps: dict[int, dict] = {}
    evaluations: dict[int, dict] = {}
    prefix = "evaluation/"
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            if number == len(lines) and not text.endswith("\n"):
                break
            raise BadArgument(f"{file} line {number} is not JSON with a step; remove the line") from None
        if any(key.startswith(prefix) for key in row):
            values = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            evaluations[step] = values | {"step": step}
        else:
            steps[step] = row | {"step": step}
    if begun and not steps and not evaluations:
        raise BadArgument(f"{file} holds no step and no evaluation")
    return Run(
        name or path.resolve().name,
        _objective(path),
        *([rows[s] for s in sorted(rows)] for rows in (steps, evaluations)),
    )


def read_evaluations(path: Path) -> list[dict]:
    """Read the evaluations of the run in `path`, the last of each step. Raises BadArgument if there is none."""
    evaluations = read_run(path).evaluations
    if not evaluations:
        raise BadArgument(f"{path / 'metrics.jsonl'} holds no evaluation; the run was made without data.evaluation")
    return evaluations


def _objective(path: Path) -> str:
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        objective = ObjectiveConfig(**config["objective"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return ""
    return f"{title(objective)} ({settings(objective)})"


def value(row: dict, key: str) -> float:
    """Return a number of a row; NaN if it is missing, null or no number."""
    found = row.get(key)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else math.nan


def accuracy_interval(evaluation: dict) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy: the run's own if it has one, else Wilson's over the problems.

    The k samples of a problem are not independent. Counting problems instead of samples would be exact if a problem's
    samples were all equal, so the interval is never too narrow (E. B. Wilson, JASA 22 (1927), 209-212).
    """
    low, high = value(evaluation, "accuracy/low"), value(evaluation, "accuracy/high")
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    p, n, z = value(evaluation, "accuracy"), value(evaluation, "problems"), 1.959964
    if not (0 <= p <= 1 and n > 0):
        return math.nan, math.nan
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
