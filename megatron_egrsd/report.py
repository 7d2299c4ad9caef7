"""What a run has achieved: the table before and after, and the picture of accuracy against response length.

An evaluation is a dictionary with the keys of sampling.summarize, and "step".
"""

import json
import math
from pathlib import Path

from megatron_egrsd.errors import BadArgument

_ROWS = [  # key, name, format, unit of the change
    ("accuracy", "accuracy (avg@{k})", "percent"),
    ("pass", "pass@{k}", "percent"),
    ("length/mean", "response length, mean", "tokens"),
    ("length/median", "response length, median", "tokens"),
    ("length/p95", "response length, 95th percentile", "tokens"),
    ("truncated", "truncated responses", "percent"),
]

# Blue and orange of the Okabe-Ito palette: told apart with every colour vision, and in grey by their lightness.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#5A5A5A"


def summary_table(before: dict, after: dict) -> str:
    """Held-out accuracy and length before and after training; shares change in points, lengths in per cent."""
    k = f"{after.get('k', 0):.0f}"
    problems = f"{after['problems']:.0f} problems x " if after.get("problems") else ""
    title = f"held-out ({problems}{k} samples)"
    lines = [f"{title:<36}{'before':>10}{'after':>10}{'change':>13}"]
    for key, name, unit in _ROWS:
        a, b = before.get(key), after.get(key)
        if a is None or b is None:
            continue
        if unit == "percent":
            cells = f"{100 * a:>9.1f}%{100 * b:>9.1f}%{100 * (b - a):>+9.1f} pts"
        else:
            change = f"{100 * (b - a) / a:+.1f} %" if a else "-"
            cells = f"{a:>10.1f}{b:>10.1f}{change:>13}"
        lines.append(f"{name.format(k=k):<36}{cells}")
    rule = "-" * len(lines[0])
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def plot_frontier(evaluations: list[dict], path: Path) -> None:
    """A PNG: accuracy against mean response length, one point an evaluation, and both over the steps."""
    points = sorted((e for e in evaluations if _drawable(e)), key=lambda e: e["step"])
    if not points:
        raise BadArgument("there is no evaluation to draw; set data.evaluation")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.9, 1])
    frontier = figure.add_subplot(grid[:, 0])
    _draw_frontier(frontier, points)
    steps = [p["step"] for p in points]
    over_steps = [figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])]
    for axes, key, name, colour in zip(
        over_steps, ("accuracy", "length/mean"), ("accuracy", "mean length (tokens)"), (_BLUE, _ORANGE), strict=True
    ):
        axes.plot(steps, [p[key] for p in points], color=colour, marker="o", markersize=4, linewidth=2, clip_on=False)
        axes.set_title(name, loc="left", fontsize=10, color=colour)
        axes.set_ylim(bottom=0, top=1 if key == "accuracy" else None)
        axes.set_xlim(left=0, right=max(steps) or 1)
    over_steps[0].tick_params(labelbottom=False)
    over_steps[1].set_xlabel("training step")
    for axes in (frontier, *over_steps):
        axes.grid(True, color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GREY, labelsize=9)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#B0B0B0")
    figure.savefig(path)


def _draw_frontier(axes, points: list[dict]) -> None:
    x, y = [p["length/mean"] for p in points], [p["accuracy"] for p in points]
    axes.plot(x, y, color="#9DB8CC", linewidth=1.5, zorder=1)
    axes.scatter(x[1:-1], y[1:-1], s=42, color=_BLUE, edgecolor="white", linewidth=1, zorder=2)
    ends = {0: ("start", "s", _GREY), len(points) - 1: ("end", "*", _ORANGE)}
    for i, (name, marker, colour) in ends.items():
        size = 380 if marker == "*" else 110
        axes.scatter(x[i], y[i], s=size, marker=marker, color=colour, edgecolor="white", linewidth=1.2, zorder=3)
        if len(points) == 1:
            name = "start = end"
        label = f"{name} (step {points[i]['step']})\n{100 * y[i]:.1f} %, {x[i]:.0f} tokens"
        # Sideways towards the middle of the picture, up or down away from it: clear of curve and frame.
        left, high = x[i] > (min(x) + max(x)) / 2, y[i] >= (min(y) + max(y)) / 2
        axes.annotate(
            label,
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
        axes.annotate(str(points[i]["step"]), (x[i], y[i]), **offset, fontsize=8, color=_GREY)
    axes.margins(0.1, 0.18)
    axes.set_xlabel("mean response length (tokens)     \N{LEFTWARDS ARROW} shorter is better")
    axes.set_ylabel("held-out accuracy     higher is better \N{RIGHTWARDS ARROW}")
    axes.set_title("Accuracy against response length, by training step", loc="left", fontsize=12)


def _labelled(x: list[float], y: list[float]) -> list[int]:
    """The inner points that get their step as a label: those that stand clear of every label before them."""
    width, height = (max(x) - min(x)) or 1.0, (max(y) - min(y)) or 1.0
    taken, chosen = [0, len(x) - 1], []
    for i in range(1, len(x) - 1):
        if all(math.hypot((x[i] - x[j]) / width, (y[i] - y[j]) / height) > 0.06 for j in taken):
            taken.append(i)
            chosen.append(i)
    return chosen


def _drawable(evaluation: dict) -> bool:
    return all(
        isinstance(evaluation.get(k), (int, float)) and math.isfinite(evaluation[k])
        for k in ("step", "accuracy", "length/mean")
    )


def read_evaluations(run: Path) -> list[dict]:
    """The evaluations in a run's metrics.jsonl; the last one of each step. BadArgument where there is none."""
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise BadArgument(f"{run} holds no metrics.jsonl; give the directory of a run (the `output` of its config)")
    found: dict[int, dict] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise BadArgument(f"{file} line {number} is not JSON; remove the line") from None
        prefix = "evaluation/"
        if "evaluation/accuracy" in row:
            values = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            found[row["step"]] = values | {"step": row["step"]}
    if not found:
        raise BadArgument(f"{file} holds no evaluation; the run was made without data.evaluation")
    return [found[step] for step in sorted(found)]


def main(run: str) -> None:
    """Print the table of `run` and draw its frontier.png again."""
    evaluations = read_evaluations(Path(run))
    print(summary_table(evaluations[0], evaluations[-1]))
    path = Path(run) / "frontier.png"
    plot_frontier(evaluations, path)
    print(path)
