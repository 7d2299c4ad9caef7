"""The pictures of the report, for one run or several: matplotlib figures, without pyplot's state and a display."""

import io
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_egrsd.report.runs import Run, accuracy_interval, value
from megatron_egrsd.system.files import atomic

# The palette of Okabe and Ito without its yellow and black: distinguishable with every colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
_STYLES = ["-", "--", ":"]  # for more runs than colours
INK, GREY, _FRAME, _GRID, PALE = "#1d2125", "#5a6068", "#b0b4b8", "#e4e6e8", "#9db8cc"
# In the page these become the page's own light, dark and paper colours.
_VARIABLES = {INK: "var(--ink)", GREY: "var(--muted)", _FRAME: "var(--line)", _GRID: "var(--line)"}

_PHASES = [
    ("time/generate", "generate"),
    ("time/score", "score"),
    ("time/train", "train"),
    ("time/sync", "sync weights"),
]


def frontier(runs: list[Run]) -> Figure:
    """Draw accuracy against mean response length, one point per evaluation, and both over the steps; 95 % bands."""
    figure = canvas(10, 5)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.9, 1])
    main = axes_on(figure, grid[:, 0])
    accuracy, length = axes_on(figure, grid[0, 1]), axes_on(figure, grid[1, 1])
    for i, run in enumerate(runs):
        points = drawable(run.evaluations)
        if not points:
            continue
        steps, x, y = ([value(p, key) for p in points] for key in ("step", "length/mean", "accuracy"))
        low, high = zip(*map(accuracy_interval, points), strict=True)
        colour = COLOURS[i % len(COLOURS)]
        main.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
        accuracy.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(runs) == 1:
            _one_frontier(main, steps, x, y)
        else:
            main.plot(x, y, **_line(i), marker="o", markersize=5, markeredgecolor="white", markeredgewidth=0.7)
            main.scatter(x[-1], y[-1], s=260, marker="*", color=colour, edgecolor="white", linewidth=1, zorder=4)
        # A single run has a colour per quantity, several runs have a colour per run.
        other = COLOURS[1] if len(runs) == 1 else colour
        for axes, values, line in ((accuracy, y, colour), (length, x, other)):
            axes.plot(steps, values, **(_line(i) | {"color": line}), marker="o", markersize=4, clip_on=False)
    entitle(main, "Accuracy against response length, by training step", size=12)
    main.margins(0.1, 0.18)
    main.set_xlabel("mean response length (tokens)     \N{LEFTWARDS ARROW} shorter is better")
    main.set_ylabel("held-out accuracy     higher is better \N{RIGHTWARDS ARROW}")
    entitle(accuracy, "accuracy")
    entitle(length, "mean length (tokens)")
    accuracy.set_ylim(0, 1)
    length.set_ylim(bottom=0)
    for axes in (accuracy, length):
        axes.set_xlim(left=0)
    accuracy.tick_params(labelbottom=False)
    length.set_xlabel("training step")
    _legend(figure, runs)
    return figure


def _one_frontier(axes, steps: list[float], x: list[float], y: list[float]) -> None:
    axes.plot(x, y, color=PALE, linewidth=1.5, zorder=1)
    axes.scatter(x[1:-1], y[1:-1], s=42, color=COLOURS[0], edgecolor="white", linewidth=1, zorder=2)
    ends = {0: ("start", "s", GREY), len(x) - 1: ("end", "*", COLOURS[1])}
    for i, (name, marker, colour) in ends.items():
        size = 380 if marker == "*" else 110
        axes.scatter(x[i], y[i], s=size, marker=marker, color=colour, edgecolor="white", linewidth=1.2, zorder=3)
        name = "start = end" if len(x) == 1 else name
        # Labels move sideways towards the middle of the picture and vertically away from it: clear of curve and frame.
        left, high = x[i] > (min(x) + max(x)) / 2, y[i] >= (min(y) + max(y)) / 2
        axes.annotate(
            f"{name} (step {steps[i]:.0f})\n{100 * y[i]:.1f} %, {x[i]:.0f} tokens",
            (x[i], y[i]),
            xytext=(-10 if left else 10, 8 if high else -8),
            textcoords="offset points",
            ha="right" if left else "left",
            va="bottom" if high else "top",
            color=colour,
            fontsize=10,
            fontweight="bold",
            zorder=4,
        )
    for i in _labelled(x, y):
        offset = {"xytext": (6, 3), "textcoords": "offset points"}
        axes.annotate(f"{steps[i]:.0f}", (x[i], y[i]), **offset, fontsize=8, color=GREY)


def _labelled(x: list[float], y: list[float]) -> list[int]:
    """Return the inner points that get their step as a label: points that are clear of every earlier label."""
    width, height = (max(x) - min(x)) or 1.0, (max(y) - min(y)) or 1.0
    taken, chosen = [0, len(x) - 1], []
    for i in range(1, len(x) - 1):
        if all(math.hypot((x[i] - x[j]) / width, (y[i] - y[j]) / height) > 0.06 for j in taken):
            taken.append(i)
            chosen.append(i)
    return chosen


def drawable(evaluations: list[dict]) -> list[dict]:
    return [e for e in evaluations if all(math.isfinite(value(e, k)) for k in ("step", "accuracy", "length/mean"))]


def curves(runs: list[Run], panels: list[tuple[str, str]]) -> Figure | None:
    """Draw one small panel per metric over the steps; None if no run has any of the metrics.

    A long run gets a moving average over a twenty-fifth of its steps, over faint single values.
    """
    panels = [(k, name) for k, name in panels if any(math.isfinite(value(s, k)) for r in runs for s in r.steps)]
    if not panels:
        return None
    rows = -(-len(panels) // 3)
    figure = canvas(10, 2.3 * rows + 0.35)
    grid = figure.add_gridspec(rows, 3)
    for n, (key, name) in enumerate(panels):
        axes = axes_on(figure, grid[n // 3, n % 3])
        entitle(axes, name)
        for i, run in enumerate(runs):
            if not run.steps:  # evaluated at its start, and not trained yet
                continue
            steps, values = _series(run, key)
            window = max(1, len(values) // 25)
            if window > 1:
                axes.plot(steps, values, color=_line(i)["color"], linewidth=0.7, alpha=0.35)
            axes.plot(steps, _moving_average(values, window), **_line(i))
        found = [v for run in runs for v in _series(run, key)[1] if math.isfinite(v)]
        if min(found) >= 0 and key != "gate/mean":  # a gate is never far from 1
            axes.set_ylim(bottom=0)
        if n >= len(panels) - 3:
            axes.set_xlabel("training step")
    _legend(figure, runs)
    return figure


def _series(run: Run, key: str) -> tuple[list[int], np.ndarray]:
    return [s["step"] for s in run.steps], np.array([value(s, key) for s in run.steps])


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Compute the centred mean over `window` values, ignoring missing ones; over fewer values at the ends."""
    kernel, there = np.ones(window), np.isfinite(values)
    count = np.convolve(there, kernel, "same")
    total = np.convolve(np.where(there, values, 0.0), kernel, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=(count > 0) & there)


def time_spent(runs: list[Run]) -> Figure | None:
    """Draw the seconds of each phase: the mean step of each run as a bar, and every step stacked. None if untimed."""
    timed = [(run, phases(run)) for run in runs]
    timed = [(run, parts) for run, parts in timed if parts]
    if not timed:
        return None
    columns = min(3, len(timed))
    rows = -(-len(timed) // columns)
    bars = 0.4 * len(timed) + 0.5
    figure = canvas(10, bars + 2.1 * rows + 0.7)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[bars, *[2.1] * rows])
    top, shared = axes_on(figure, grid[0, :]), None
    colours = [*COLOURS[:4], _FRAME]
    for n, (run, parts) in enumerate(timed):
        start = 0.0
        for (name, seconds), colour in zip(parts.items(), colours, strict=True):
            mean = float(seconds.mean())
            top.barh(n, mean, left=start, color=colour, height=0.6, label=name if n == 0 else None)
            if mean > 0.06 * max(sum(p.mean() for p in other.values()) for _, other in timed):
                top.text(start + mean / 2, n, f"{mean:.3g} s", ha="center", va="center", color="white", fontsize=8)
            start += mean
        axes = shared = axes_on(figure, grid[1 + n // columns, n % columns], sharey=shared)
        axes.stackplot([s["step"] for s in run.steps], *parts.values(), colors=colours, linewidth=0)
        entitle(axes, run.name)
        axes.set_xlabel("training step")
        axes.margins(x=0)
        if n % columns == 0:
            axes.set_ylabel("seconds", color=GREY)
    top.set_yticks(range(len(timed)), [run.name for run, _ in timed])
    top.invert_yaxis()
    top.grid(False, axis="y")
    top.set_xlabel("seconds of the mean step")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def phases(run: Run) -> dict[str, np.ndarray]:
    """Return the seconds of each phase at every step; "other" is the rest of the step. Empty if nothing is timed."""
    whole = _series(run, "time/step")[1]
    if not len(whole) or not np.isfinite(whole).any():
        return {}
    parts = {name: np.nan_to_num(_series(run, key)[1]) for key, name in _PHASES}
    return parts | {"other": np.clip(np.nan_to_num(whole) - sum(parts.values()), 0, None)}


def mechanism(gap: np.ndarray, weight: np.ndarray, share: dict[str, float], restored: dict[str, float]) -> Figure:
    """Draw the paper's Figure 4: gap and weight by entropy decile, [10] each; share and restored weight by regime."""
    figure = canvas(10, 3.8)
    grid = figure.add_gridspec(1, 2, width_ratios=[1.4, 1])
    left, right = axes_on(figure, grid[0, 0]), axes_on(figure, grid[0, 1])
    deciles = np.arange(1, len(gap) + 1)
    left.bar(deciles, gap, color=PALE, width=0.7)
    left.set_xlabel("decile of teacher entropy     sure \N{RIGHTWARDS ARROW} unsure")
    left.set_ylabel("mean |log p_T − log p_S|, nats (bars)")
    other = left.twinx()
    other.plot(deciles, weight, color=COLOURS[1], marker="o", markersize=5, linewidth=1.8)
    other.set_ylabel("mean token weight w ω (line)", color=COLOURS[1])
    other.tick_params(colors=COLOURS[1], labelsize=9)
    other.spines[["top", "left", "bottom"]].set_visible(False)
    other.set_ylim(min(0.6, float(np.nanmin(weight)) - 0.05), max(1.05, float(np.nanmax(weight)) + 0.02))
    entitle(left, "The gate closes where the teacher is unsure")
    places = np.arange(len(share))
    bars = right.bar(places, [100 * v for v in share.values()], color=COLOURS[0], width=0.6)
    labels = [f"{100 * s:.1f} %\n+{r:.3f}" for s, r in zip(share.values(), restored.values(), strict=True)]
    right.bar_label(bars, labels, fontsize=9, color=GREY, padding=2)
    right.set_xticks(places, list(share))
    right.set_ylabel("share of tokens, %")
    right.margins(y=0.25)
    entitle(right, "Token regimes, weight restored (+)")
    return figure


# -- parts shared by all figures --------------------------------------------------------------------------------


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)  # type: ignore[call-arg]
    FigureCanvasAgg(figure)
    return figure


def axes_on(figure: Figure, cell, **options):
    axes = figure.add_subplot(cell, **options)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FRAME)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return axes


def entitle(axes, text: str, size: float = 10) -> None:
    axes.set_title(text, loc="left", fontsize=size, color=INK)


def _line(i: int) -> dict:
    style = _STYLES[i // len(COLOURS) % len(_STYLES)]
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": style, "linewidth": 1.8}


def _legend(figure: Figure, runs: list[Run]) -> None:
    if len(runs) == 1:
        return
    lines = [matplotlib.lines.Line2D([], [], **_line(i), label=run.name) for i, run in enumerate(runs)]
    columns = min(len(runs), 4)
    figure.legend(handles=lines, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


def save_png(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def to_svg(figure: Figure) -> str:
    """Return the figure as an <svg> element for a page: without fixed size, with the page's neutral colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "megatron_egrsd"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-zA-Z0-9]+(\.[a-z]+)?_\d+"', "", svg)  # matplotlib numbers the parts of each figure from 1
    svg = re.sub(r'(<svg[^>]*?) width="[^"]+"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
