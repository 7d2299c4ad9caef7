"""The picture of a run as an HTML page that loads itself again: the report's curves, a sample, the latest steps."""

import math
import time
from pathlib import Path

from markupsafe import Markup

from megatron_egrsd.report import figures
from megatron_egrsd.report.html import script, template
from megatron_egrsd.report.run_page import pictures
from megatron_egrsd.report.runs import Run, value
from megatron_egrsd.run.step_line import StepLine, duration, show
from megatron_egrsd.system.files import write_text
from megatron_egrsd.watch.braille import averaged
from megatron_egrsd.watch.state import State

_TEMPLATES = Path(__file__).parent / "templates"
_TILES = {
    "accuracy": ("accuracy", ".1%"),
    "reward/mean": ("reward", ".3f"),
    "response/length": ("response length", ",.1f"),
    "response/truncated": ("cut off", ".1%"),
    "student/entropy": ("student entropy", ".3f"),
    "gate/mean": ("mean gate ω", ".3f"),
    "optimizer/grad_norm": ("gradient norm", ".3g"),
    "perf/tokens_per_second": ("tokens a second", ",.0f"),
}
_POINTS = 80  # of a tile's line, at most
_LINES = 12  # step lines
_FIRST = 3  # steps whose mean a tile compares with


class Page:
    """Writer of the page of a run to `path`, again and again; it draws the curves only if the metrics have changed."""

    def __init__(self, path: Path):
        self.path = path
        self.drawn: tuple[Run | None, list[tuple[str, str, str, Markup]]] = None, []

    def write(self, state: State, every: float, error: str = "") -> None:
        """Write the page, which loads itself again after `every` seconds; 0 for never. `error` is shown above all."""
        if self.drawn[0] is not state.run:
            self.drawn = state.run, _sections(state.run)
        write_text(self.path, _html(state, self.drawn[1], every, error))


def _sections(run: Run) -> list[tuple[str, str, str, Markup]]:
    """Return the report's pictures; that of the evaluations comes last, and not before there are two to compare."""
    if not run.steps:
        return []
    drawn = [p for p in pictures([run]) if p[0] != "frontier" or len(run.evaluations) > 1]
    drawn.sort(key=lambda picture: picture[0] == "frontier")
    return [(name, title, caption, Markup(figures.to_svg(figure))) for name, title, caption, figure in drawn]


def _html(state: State, sections: list, every: float, error: str) -> str:
    total, now, sample = state.total_steps, time.time(), state.sample
    lines = StepLine(total or max(1, state.step))
    times = state.seconds
    rows = state.run.steps[-_LINES:]
    weights = [f"{w:+.3f}".replace("-", "−") for w in sample.weights] if sample and sample.weights else None
    return template("watch.html", _TEMPLATES).render(
        state=state,
        total=total,
        share=min(1.0, state.step / total) if total else 0.0,
        every=f"{every:g}",
        now=f"{now:.0f}",
        life=duration(max(0.0, now - state.written)) if state.written and state.stage != "finished" else "",
        error=error,
        facts=_facts(state),
        tiles=[tile for key in _TILES if (tile := _tile(state.run, key))],
        sections=sections,
        tokens=list(zip(sample.pieces, sample.shades, weights or [""] * len(sample.pieces), strict=True))
        if sample
        else [],
        header=lines.header(),
        lines=[lines.line(row["step"], row, times[: len(times) - back]) for back, row in enumerate(reversed(rows))],
        **script("watch.js", _TEMPLATES),
    )


def _facts(state: State) -> list[tuple[str, str]]:
    total, step, seconds = state.total_steps, state.step, state.seconds
    facts = [("step", f"{step} of {total}" if total else str(step))]
    if state.stage == "running" and seconds and step < total:
        facts.append(("left", duration(StepLine(total).seconds_left(step, seconds))))
    if seconds:
        facts.append(("a step takes", f"{seconds[-1]:.1f} s"))
    if evaluations := figures.drawable(state.run.evaluations):
        first, last = evaluations[0], evaluations[-1]
        text = show(last, "accuracy", ".1%")
        facts.append(("held-out", f"{show(first, 'accuracy', '.1%')} → {text}" if len(evaluations) > 1 else text))
        length = show(last, "length/mean", ",.0f")
        change = f"{show(first, 'length/mean', ',.0f')} → {length}" if len(evaluations) > 1 else length
        facts.append(("held-out length", f"{change} tokens"))
    return facts


def _tile(run: Run, key: str) -> dict | None:
    """Return name, newest value, change and line of a metric; None if no step has it."""
    name, form = _TILES[key]
    values = [value(row, key) for row in run.steps]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    first = sum(finite[:_FIRST]) / len(finite[:_FIRST])
    change = f"at first {first:{form}}" if len(finite) > _FIRST else ""
    return {"name": name, "value": f"{finite[-1]:{form}}", "change": change, "lines": _polylines(values)}


def _polylines(values: list[float]) -> list[str]:
    """Return the points of a line of at most _POINTS values in a box of 100 by 26; a gap begins another line."""
    means = averaged(values, min(_POINTS, len(values)))
    finite = [v for v in means if math.isfinite(v)]
    low, high = min(finite), max(finite)
    lines: list[list[str]] = [[]]
    for i, mean in enumerate(means):
        if not math.isfinite(mean):
            lines.append([])
            continue
        x = 100 * i / max(1, len(means) - 1)
        y = 24 - 22 * ((mean - low) / (high - low) if high > low else 0.5)
        lines[-1].append(f"{x:.1f},{y:.1f}")
    return [" ".join(line) for line in lines if len(line) > 1]
