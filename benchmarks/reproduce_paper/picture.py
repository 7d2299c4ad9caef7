"""The figures of the page: accuracy against length (the paper's Figure 1) and gradient norms (Figure A1)."""

import math

from matplotlib.figure import Figure

from benchmarks.reproduce_paper.numbers import Number
from benchmarks.reproduce_paper.published import CLIP
from megatron_egrsd.report.figures import COLOURS, GREY, INK, axes_on, canvas, entitle
from megatron_egrsd.report.runs import Run, value

_COLOURS = {"untrained": GREY, **dict(zip(("SFT", "GRPO", "OPSD", "CRISP", "EGRSD", "CL-EGRSD"),
                                          (COLOURS[4], COLOURS[5], COLOURS[2], COLOURS[3], COLOURS[0], COLOURS[1]),
                                          strict=True))}  # fmt: skip


def frontier(rows: dict[str, dict[str, Number]]) -> Figure | None:
    """Draw Avg against AvgLen of each method, ours filled, the paper's hollow; None if there is none of ours."""
    if not any(row["avg"].ours and row["avg_len"].ours for row in rows.values()):
        return None
    figure = canvas(10, 4.6)
    axes = axes_on(figure, figure.add_gridspec(1, 1)[0, 0])
    for method, row in rows.items():
        y, x, colour = row["avg"], row["avg_len"], _COLOURS[method]
        published = x.paper is not None and y.paper is not None
        if published:
            axes.plot(x.paper, y.paper, "o", markerfacecolor="none", markeredgecolor=colour, markersize=9)
        if y.ours is None or x.ours is None:
            continue
        if published:
            axes.plot([x.paper, x.ours.value], [y.paper, y.ours.value], color=colour, linewidth=0.7, linestyle=":")
        errors = {f"{name}err": [[v.value - v.low], [v.high - v.value]]
                  for name, v in (("x", x.ours), ("y", y.ours)) if v.low is not None}  # fmt: skip
        axes.errorbar(x.ours.value, y.ours.value, **errors, fmt="o", color=colour, capsize=2, markersize=7,
                      elinewidth=1, label=method, zorder=3)  # fmt: skip
    axes.margins(0.1)
    axes.set_xlabel("AvgLen, tokens     \N{LEFTWARDS ARROW} shorter is better")
    axes.set_ylabel("Avg, %     higher is better \N{RIGHTWARDS ARROW}")
    axes.plot([], [], "o", markerfacecolor="none", markeredgecolor=GREY, markersize=9, label="the paper's")
    figure.legend(loc="outside upper left", ncols=8, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def gradient_norms(runs: dict[str, Run]) -> Figure | None:
    """Draw the norm before clipping of every step of each method, by its title; None if there is no run."""
    if not runs:
        return None
    figure = canvas(10, 3.6)
    axes = axes_on(figure, figure.add_gridspec(1, 1)[0, 0])
    for method, run in runs.items():
        points = [(row["step"], norm) for row in run.steps if math.isfinite(norm := value(row, "optimizer/grad_norm"))]
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), color=_COLOURS[method], linewidth=1.4, marker=marker, label=method)
    axes.axhline(CLIP, color=GREY, linestyle="-.", linewidth=1, label=f"clipped above {CLIP:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    entitle(axes, "gradient norm before clipping")
    figure.legend(loc="outside upper left", ncols=6, frameon=False, fontsize=9, labelcolor=INK)
    return figure
