"""The tables of docs/measurements/results.md, out of the runs: every number there is written by this file."""

import csv
import functools
import json
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.measure import table
from benchmarks.paired import Difference, difference, holm
from benchmarks.validate_method.hypotheses import EVALUATED, MARGIN, Comparison, comparisons, settings
from benchmarks.validate_method.power import LEVEL, powers, resolved
from benchmarks.validate_method.record import read_record
from benchmarks.validate_method.run import Run, is_complete, runs_of
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.report import read_evaluations
from megatron_egrsd.report.runs import read_run
from megatron_egrsd.system.files import write_text

_COLUMNS = ("setting", "seed", "accuracy", "length", "training_accuracy", "tokens", "seconds")
Rows = dict[str, dict[int, dict[str, float]]]  # setting -> seed -> outcome
_table = functools.partial(table, align="---")


def collect(output: Path, own: str = "") -> Rows:
    """Return each finished run's held-out accuracy and length, and accuracy, tokens and seconds of its training."""
    rows: Rows = {}
    for run in runs_of(output, own=own):
        if is_complete(run.path):
            final, steps = read_evaluations(run.path)[-1], read_run(run.path).steps
            rows.setdefault(run.setting.name, {})[run.seed] = {
                "accuracy": final["accuracy"],
                "length": final["length/mean"],
                "training_accuracy": float(np.mean([s["accuracy"] for s in steps])),
                "tokens": float(sum(s["batch/tokens"] for s in steps)),
                "seconds": float(sum(s["time/step"] for s in steps)),
            }
    if not rows:
        raise BadArgument(f"there is no finished run in {output}; make some with examples/validate_method.sh")
    return {s.name: rows[s.name] for s in settings(own) if s.name in rows}


def write_csv(rows: Rows, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for setting, seeds in rows.items():
            for seed, row in sorted(seeds.items()):
                writer.writerow([setting, seed, *(f"{row[c]:.5g}" for c in _COLUMNS[2:])])


def extent(runs: list[Run], csv_name: str) -> str:
    """Say how many of the planned runs there are, which are missing, and when, where and of which commit they are."""
    done = [run for run in runs if is_complete(run.path)]
    records = [read_record(run.path) for run in done]
    timed = sorted((r["began"], r["ended"]) for r in records if "ended" in r)
    lines = [f"{len(done)} of {len(runs)} planned runs: [{csv_name}]({csv_name})."]
    if timed:
        days = sorted({datetime.fromtimestamp(t, UTC) for pair in timed for t in pair})
        first, last = (f"{day.day} {day:%B %Y}" for day in (days[0], days[-1]))
        machines = ", ".join(sorted({r["machine"] for r in records if "machine" in r}))
        loads = [r["load"] for r in records if "load" in r]
        lines.append(
            f"Measured on {first if first == last else f'{first} to {last}'} with `bash examples/validate_method.sh`, "
            f"{_commits(records)}, on {machines}: {_covered(timed) / 60:.0f} minutes of wall clock for the runs, load "
            f"average {np.median(loads):.1f} (median), at most {max(loads):.1f}."
        )
    if missing := Counter(run.setting.name for run in runs if run not in done):
        lines.append("Missing: " + ", ".join(f"{name} ({count})" for name, count in missing.items()) + ".")
    return "\n".join(lines)


def _commits(records: list[dict]) -> str:
    """Return the commits of the runs in the order of time; one that had changed files ends with +."""
    in_time = sorted((r for r in records if r.get("commit")), key=lambda r: r["began"])
    names = list(dict.fromkeys(r["commit"] for r in in_time))
    if not names:
        return "no git commit"
    return f"commit {names[0]}" if len(names) == 1 else f"commits {names[0]} to {names[-1]}"


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of (start, end), sorted by start."""
    total, until = 0.0, -np.inf
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def plan_blocks() -> dict[str, str]:
    """Return the tables of the page that need no run: the settings, and the number of seeds."""
    words = {s.name: " ".join(s.options) for s in settings()}
    rows = ([s.name, s.seeds, f"`{words[s.name]}`"] for s in settings())
    return {"settings": _table(["setting", "seeds", "words of `megatron-egrsd train`"], rows), "power": powers()}


def pairs(rows: Rows, comparison: Comparison, column: str) -> np.ndarray:
    """Return the differences by seed, treatment - control, over the seeds that both have."""
    treatment, control = (rows.get(name, {}) for name in (comparison.treatment, comparison.control))
    return np.array([treatment[s][column] - control[s][column] for s in sorted(treatment.keys() & control.keys())])


def outcomes(rows: Rows) -> str:
    """Return a table of every setting: means and standard deviations over its seeds."""
    columns = ["setting", "seeds", f"held-out avg@{EVALUATED}", "length, tokens", "avg over training", "sampled tokens"]
    shown = (("accuracy", 3), ("length", 1), ("training_accuracy", 3), ("tokens", 0))
    return _table(
        columns,
        ([name, len(seeds), *(_spread([r[c] for r in seeds.values()], digits) for c, digits in shown)]
         for name, seeds in rows.items()),
    )  # fmt: skip


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


@dataclass(frozen=True)
class Found:
    """A comparison's differences in held-out accuracy and in length, and their p-values after Holm's correction."""

    comparison: Comparison
    accuracy: Difference
    length: Difference
    p: float
    length_p: float
    resolved: float  # the accuracy that its pairs and their spread find with a chance of 80 % (power.py)


def compared(rows: Rows, own: str = "") -> list[Found]:
    """Return what came of each comparison with two pairs or more; the correction runs over each family of them."""
    families: dict[str, list[Comparison]] = {}
    for comparison in comparisons(own):
        if len(pairs(rows, comparison, "accuracy")) > 1:
            families.setdefault(comparison.family, []).append(comparison)
    found = []
    for members in families.values():
        accuracy, length = ([difference(pairs(rows, c, column)) for c in members] for column in ("accuracy", "length"))
        corrected = zip(*(holm([d.p for d in column]) for column in (accuracy, length)), strict=True)
        for c, a, n, (p, q) in zip(members, accuracy, length, corrected, strict=True):
            found.append(Found(c, a, n, p, q, resolved(a.deviation, a.n, LEVEL / len(members))))
    return found


def verdicts(found: list[Found]) -> str:
    """Return a table of the comparisons: held-out accuracy and length, each corrected among those of its hypothesis."""
    columns = ["hypothesis", "comparison", "expected", "pairs", f"avg@{EVALUATED}, 95 % interval", "p", "Holm's p",
               "resolves", "length, 95 % interval", "p", "Holm's p", "verdict"]  # fmt: skip
    rows = (
        [f.comparison.family, f.comparison.name, f.comparison.expected, f.accuracy.n,
         _interval(f.accuracy, 3), _p(f.accuracy.p), _p(f.p), f"{f.resolved:.3f}",
         _interval(f.length, 1), _p(f.length.p), _p(f.length_p), verdict(f)]
        for f in found
    )  # fmt: skip
    return _table(columns, rows)


def verdict(found: Found) -> str:
    """Say whether a hypothesis holds, its opposite, or neither is shown; and whether accuracy is equivalent."""
    shorter = found.comparison.expected == "shorter"
    significant = (found.length_p if shorter else found.p) < LEVEL
    words = "holds" if (found.length.mean < 0 if shorter else found.accuracy.mean > 0) else "the opposite holds"
    if found.comparison.expected == "equal":
        words = "differs"
    if not significant:
        words = "no difference shown"
    within = found.accuracy.within(MARGIN)
    return f"{words}, accuracy {'' if within else 'not '}equivalent within ±{MARGIN}"


def short(found: list[Found]) -> str:
    """Return the comparisons by what was shown: a difference, equivalence, or neither."""
    groups: dict[str, list[str]] = {"Accuracy differs": [], f"Accuracy is equivalent within ±{MARGIN}": [],
                                    "Neither is shown": [], "Length differs": []}  # fmt: skip
    differs, equivalent, neither, length = groups.values()
    for f in found:
        name = f"{f.comparison.name} ({f.comparison.family})"
        if f.p < LEVEL:
            differs.append(f"{name} {f.accuracy.mean:+.3f}")
        if f.accuracy.within(MARGIN):
            equivalent.append(name)
        elif f.p >= LEVEL:
            neither.append(name)
        if f.length_p < LEVEL:
            length.append(f"{name} {f.length.mean:+.1f} tokens")
    return "\n".join(f"- **{title}**: {'; '.join(names) or 'none'}." for title, names in groups.items())


def _interval(d: Difference, digits: int) -> str:
    return f"{d.mean:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def reading(found: dict) -> str:
    models = found["reading"]
    rows = ([key, *(f"{measured[key]:.3f}" for measured in models.values())] for key in next(iter(models.values())))
    return _table(["held-out, initial weights", *models], rows)


def gate(found: dict) -> str:
    rows = (
        [task, name, *(f"{row[k]:.3f}" for k in ("share", "h", "egrsd", "cl_egrsd"))]
        for task, measured in found["initial"].items()
        for name, row in (measured["types"] | measured["resolution"]).items()
    )
    return _table(["task", "tokens", "share", "h", "gate, EGRSD", "gate, CL-EGRSD"], rows)


def gradients(found: dict) -> str:
    rows = []
    for task, measured in found["initial"].items():
        base = measured["gradients"]["grpo"]
        for name, row in measured["gradients"].items():
            signal, noise = row["signal"] / base["signal"], row["noise"] / base["noise"]
            error = row["signal_error"] / abs(base["signal"])
            rows.append([task, name, f"{signal:.2f} ± {error:.2f}", f"{noise:.2f}", f"{signal / noise:.2f}"])
    columns = ["signal, of GRPO's", "noise, of GRPO's", "signal to noise, of GRPO's"]
    return _table(["task", "weights", *columns], rows)


def training(found: dict) -> str:
    rows = (
        [run, row["step"], *(f"{row[k]:.3f}" for k in ("scale", "uncertain", "egrsd", "cl_egrsd"))]
        for run, steps in found["training"].items()
        for row in steps
    )
    columns = ["entropy that counts as 1, nats", "tokens with h > 0.5", "mean gate, EGRSD", "mean gate, CL-EGRSD"]
    return _table(["run", "step", *columns], rows)


def write_document(blocks: dict[str, str], document: Path) -> None:
    """Put each block between `<!-- NAME -->` and `<!-- /NAME -->` of `document`.

    Raises RunError if the document lacks a place for a block.
    """
    text = document.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.S
        )
        if count != 1:
            raise RunError(
                f"{document} has {count} places for {name}; it needs one <!-- {name} --> ... <!-- /{name} -->"
            )
    write_text(document, text)


def main(output: Path, document: Path, own: str) -> None:
    """Fill `document`'s tables, and write the runs and the picture beside it."""
    from benchmarks.validate_method.picture import save

    rows = collect(output, own)
    found = compared(rows, own)
    runs_file = document.with_name("results_runs.csv")
    picture = "![where each objective ends](../images/results.png)"
    blocks = plan_blocks() | {"extent": extent(runs_of(output, own=own), runs_file.name), "short": short(found)}
    blocks |= {"verdicts": verdicts(found), "outcomes": outcomes(rows), "picture": picture}
    if (path := output / "mechanism.json").exists():
        measured = json.loads(path.read_text())
        blocks |= {"reading": reading(measured), "gate": gate(measured)}
        blocks |= {"gradients": gradients(measured), "training": training(measured)}
    write_csv(rows, runs_file)
    save(rows, document.parent.parent / "images" / "results.png")
    write_document(blocks, document)
