"""The report of one or several runs: one HTML page without any outside resource, and its pictures as PNG files."""

import math
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_egrsd.report import figures
from megatron_egrsd.report.html import template
from megatron_egrsd.report.panels import GATE, TRAINING
from megatron_egrsd.report.runs import Run, accuracy_interval, value
from megatron_egrsd.system.files import write_text


def write_report(runs: list[Run], directory: Path) -> Path:
    """Write report.html and a PNG of each picture into `directory`, over older ones; returns the page's path."""
    sections = []
    for name, title, caption, figure in pictures(runs):
        figures.save_png(figure, directory / f"{name}.png")
        sections.append((name, title, caption, Markup(figures.to_svg(figure))))
    page = directory / "report.html"
    rows = [_summary(run) | {"colour": figures.COLOURS[i % len(figures.COLOURS)]} for i, run in enumerate(runs)]
    write_text(page, template("report.html").render(runs=runs, rows=rows, figures=sections))
    return page


def pictures(runs: list[Run]) -> list[tuple[str, str, str, Figure]]:
    """Return name, title, caption and figure of each picture that the runs have numbers for."""
    drawn = [
        (
            "frontier",
            "Frontier",
            "Each point is an evaluation on the held-out problems; up and to the left is better. The bands are 95 % "
            "intervals of the accuracy over the problems.",
            figures.frontier(runs) if any(figures.drawable(r.evaluations) for r in runs) else None,
        ),
        (
            "training",
            "Training",
            "Over the rollouts of each training batch, at the sampling temperature.",
            figures.curves(runs, TRAINING),
        ),
        (
            "gate",
            "Entropy, ratio and gate",
            "Means over the trained tokens. A gate of 1 leaves a token its weight; it closes if the teacher is "
            "uncertain. The ratio is clipped if teacher and student differ by more than ε.",
            figures.curves(runs, GATE),
        ),
        (
            "time",
            "Time",
            "Above: the mean step of each run. Below: every step, with its phases stacked.",
            figures.time_spent(runs),
        ),
    ]
    return [(name, title, caption, figure) for name, title, caption, figure in drawn if figure is not None]


def _summary(run: Run) -> dict:
    """Return one row of the page's table; numbers are text, missing if the run has not measured them."""
    row = {"name": run.name, "objective": run.objective, "steps": run.steps[-1]["step"] if run.steps else 0}
    points = figures.drawable(run.evaluations)
    if points:
        before, after = points[0], points[-1]
        low, high = accuracy_interval(after)
        a, b = value(before, "length/mean"), value(after, "length/mean")
        row |= {
            "before": f"{100 * before['accuracy']:.1f} %",
            "after": f"{100 * after['accuracy']:.1f} %",
            "interval": f"{100 * low:.1f} to {100 * high:.1f}" if math.isfinite(low) else "",
            "length_before": f"{a:.1f}",
            "length_after": f"{b:.1f}",
            "change": f"{100 * (b - a) / a:+.1f} %".replace("-", "−") if a else "",
        }
    tokens = [value(s, "batch/tokens") for s in run.steps]
    seconds = [value(s, "time/step") for s in run.steps]
    row["tokens"] = f"{sum(t for t in tokens if math.isfinite(t)):,.0f}"
    row["time"] = _duration(sum(s for s in seconds if math.isfinite(s)))
    return row


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
