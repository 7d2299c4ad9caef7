"""The tables of docs/measurements/results.md, out of the runs: every number there is written by this file."""

import csv
import functools
import json
import re
from pathlib import Path

import numpy as np

from benchmarks.measure import table
from benchmarks.paired import Difference, difference, holm
from benchmarks.validate_method.plan import HYPOTHESES, MARGIN, Hypothesis, settings
from benchmarks.validate_method.run import is_complete, path_of
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.report import read_evaluations
from megatron_egrsd.report.runs import read_run
from megatron_egrsd.system.files import write_text

_COLUMNS = ("setting", "seed", "accuracy", "length", "training_accuracy", "training_length", "seconds")
Rows = dict[str, dict[int, dict[str, float]]]  # setting -> seed -> outcome
_table = functools.partial(table, align="---")


def collect(output: Path, own: str = "") -> Rows:
    """Every finished run: held-out accuracy and mean length at the end, their means over training, its seconds."""
    rows: Rows = {}
    for setting in settings(own):
        for seed in range(setting.seeds):
            if is_complete(path := path_of(output, setting, seed)):
                final, steps = read_evaluations(path)[-1], read_run(path).steps
                rows.setdefault(setting.name, {})[seed] = {
                    "accuracy": final["accuracy"],
                    "length": final["length/mean"],
                    "training_accuracy": float(np.mean([s["accuracy"] for s in steps])),
                    "training_length": float(np.mean([s["response/length"] for s in steps])),
                    "seconds": float(sum(s["time/step"] for s in steps)),
                }
    if not rows:
        raise BadArgument(f"there is no finished run in {output}; make some with examples/validate_method.sh")
    return rows


def write_csv(rows: Rows, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for setting, seeds in rows.items():
            for seed, row in sorted(seeds.items()):
                writer.writerow([setting, seed, *(f"{row[c]:.5g}" for c in _COLUMNS[2:])])


def pairs(rows: Rows, hypothesis: Hypothesis, column: str) -> np.ndarray:
    """The differences by seed, over the seeds that all sides have."""
    signs = [(hypothesis.treatment, 1.0), (hypothesis.control, -1.0)]
    if hypothesis.minus:
        signs += [(hypothesis.minus[0], -1.0), (hypothesis.minus[1], 1.0)]
    seeds = sorted(set.intersection(*(set(rows.get(name, {})) for name, _ in signs)))
    return np.array([sum(sign * rows[name][seed][column] for name, sign in signs) for seed in seeds])


def outcomes(rows: Rows) -> str:
    """Every setting: means and standard deviations over its seeds."""
    columns = ["setting", "seeds", "held-out avg@8", "length, tokens", "avg over training"]
    shown = (("accuracy", 3), ("length", 1), ("training_accuracy", 3))
    return _table(
        columns,
        ([name, len(seeds), *(_spread([r[c] for r in seeds.values()], digits) for c, digits in shown)]
         for name, seeds in rows.items()),
    )  # fmt: skip


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


_COMPARED = ["pairs", "avg@8, 95 % interval", "p", "Holm's p", "length, 95 % interval", "p", "Holm's p"]


def verdicts(rows: Rows) -> str:
    """The hypotheses on held-out accuracy (corrected among each other), and the same differences in length."""
    compared = _compared(rows, HYPOTHESES)
    return _table(["hypothesis", *_COMPARED, "verdict"],
                  ([h.name, *cells, _verdict(h, found, p)] for h, cells, found, p in compared))  # fmt: skip


def _verdict(hypothesis: Hypothesis, found: Difference, corrected: float) -> str:
    words = ["differs" if corrected < 0.05 else "no difference shown"]
    if hypothesis.margin:
        words.append(f"{'' if found.within(hypothesis.margin) else 'not '}equivalent within ±{MARGIN}")
    elif corrected < 0.05:
        words = ["holds" if found.mean > 0 else "the opposite holds"]
    return ", ".join(words)


def ablations(rows: Rows) -> str:
    """CL-EGRSD with one thing changed, against CL-EGRSD, by seed; p corrected over this table."""
    changed = [Hypothesis(name, name, name.partition(", ")[0]) for name in rows if ", " in name]
    return _table(["changed", *_COMPARED], ([h.name, *cells] for h, cells, _, _ in _compared(rows, changed)))


def _compared(rows: Rows, hypotheses: list[Hypothesis]) -> list[tuple[Hypothesis, list[object], Difference, float]]:
    """Of each hypothesis with two pairs or more: cells for _COMPARED, difference in accuracy and its corrected p."""
    tested = [h for h in hypotheses if len(pairs(rows, h, "accuracy")) > 1]
    accuracy, length = ([difference(pairs(rows, h, column)) for h in tested] for column in ("accuracy", "length"))
    corrected, by_length = (holm([d.p for d in found]) for found in (accuracy, length))
    return [
        (h, [a.n, _interval(a, 3), _p(a.p), _p(p), _interval(n, 1), _p(n.p), _p(q)], a, p)
        for h, a, n, p, q in zip(tested, accuracy, length, corrected, by_length, strict=True)
    ]


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
        [run, row["step"], *(f"{row[k]:.3f}" for k in ("quantile", "uncertain", "egrsd", "cl_egrsd"))]
        for run, steps in found["training"].items()
        for row in steps
    )
    columns = ["0.95-quantile, nats", "tokens with h > 0.5", "mean gate, EGRSD", "mean gate, CL-EGRSD"]
    return _table(["run", "step", *columns], rows)


def write_document(blocks: dict[str, str], document: Path) -> None:
    """Put each block between `<!-- NAME -->` and `<!-- /NAME -->`. RunError where the document lacks a place for it."""
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
    """Fill `document`'s tables, and write runs.csv and the picture beside it."""
    from benchmarks.validate_method.picture import save

    rows = collect(output, own)
    blocks = {"outcomes": outcomes(rows), "verdicts": verdicts(rows), "ablations": ablations(rows)}
    count, hours = sum(map(len, rows.values())), sum(r["seconds"] for s in rows.values() for r in s.values()) / 3600
    planned = sum(s.seeds for s in settings(own))
    blocks["extent"] = f"{count} of {planned} planned runs, {hours:.1f} hours of training steps in all."
    if (path := output / "mechanism.json").exists():
        found = json.loads(path.read_text())
        blocks |= {"reading": reading(found), "gate": gate(found)}
        blocks |= {"gradients": gradients(found), "training": training(found)}
    write_csv(rows, document.with_name("results_runs.csv"))
    save(rows, document.parent.parent / "images" / "results.png")
    write_document(blocks, document)
