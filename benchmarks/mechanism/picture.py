"""One picture: the paper's Figure 4 with its numbers beside ours, the gate by kind of token, style, and position."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.mechanism.tokens import KINDS, ROLES
from megatron_egrsd.report.figures import COLOURS, GREY, PALE, axes_on, canvas, entitle
from megatron_egrsd.report.mechanism import PAPER_GAP, PAPER_RESTORED, PAPER_SHARE, PAPER_WEIGHT, REGIMES


def picture(found: dict[str, Any]) -> Figure:
    figure = canvas(11, 7)
    grid = figure.add_gridspec(2, 3)
    main = found["reference"]
    _deciles(figure, grid[0, 0], found["figure_4"][main])
    _weights(figure, grid[0, 1], found["figure_4"][main])
    _regimes(figure, grid[0, 2], found["figure_4"][main])
    _kinds(figure, grid[1, 0], found["kinds"][main])
    _style(figure, grid[1, 1], found["style"])
    _position(figure, grid[1, 2], found["position"])
    return figure


def _deciles(figure: Figure, cell, own: dict[str, Any]) -> None:
    axes = axes_on(figure, cell)
    axes.bar(range(1, 11), own["gap"], color=PALE, width=0.7, label="this model")
    axes.plot([1, 10], PAPER_GAP, "D", color=COLOURS[1], label="paper (first, last)")
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1)
    axes.set_xlabel("decile of teacher entropy")
    axes.legend(frameon=False, fontsize=8)
    entitle(axes, "mean |log p_T − log p_S|, nats")


def _weights(figure: Figure, cell, own: dict[str, Any]) -> None:
    axes = axes_on(figure, cell)
    axes.plot(range(1, 11), own["weight"], color=COLOURS[0], marker="o", label="this model")
    axes.plot(range(1, 11), PAPER_WEIGHT, color=COLOURS[1], marker="D", linestyle="--", label="paper")
    axes.set_xlabel("decile of teacher entropy")
    axes.legend(frameon=False, fontsize=8)
    entitle(axes, "mean token weight w ω")


def _regimes(figure: Figure, cell, own: dict[str, Any]) -> None:
    axes, places = axes_on(figure, cell), np.arange(len(REGIMES))
    sides = ((-0.2, own["share"], own["restored"], "this model"), (0.2, PAPER_SHARE, PAPER_RESTORED, "paper"))
    for (shift, share, restored, label), colour in zip(sides, COLOURS, strict=False):
        bars = axes.bar(places + shift, [100 * share[r] for r in REGIMES], 0.4, color=colour, label=label)
        given = ["" if restored[r] is None else f"{restored[r]:.3f}"[1:] for r in REGIMES]
        axes.bar_label(bars, given, fontsize=8, color=GREY, padding=2)
    axes.set_xticks(places, REGIMES)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8)
    entitle(axes, "regimes, % of tokens (weight restored)")


def _kinds(figure: Figure, cell, kinds: dict[str, dict[str, float]]) -> None:
    axes, places = axes_on(figure, cell), np.arange(len(KINDS))
    for shift, key, colour, label in ((-0.2, "share", PALE, "of the tokens"), (0.2, "closed", COLOURS[0], "of 1 − ω")):
        axes.bar(places + shift, [100 * (kinds[k][key] or 0) for k in KINDS], 0.4, color=colour, label=label)
    axes.set_xticks(places, [kind.replace(" of ", "\nof ") for kind in KINDS], fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    entitle(axes, "on what tokens the gate closes, %")


def _style(figure: Figure, cell, style: dict[str, Any]) -> None:
    axes, names = axes_on(figure, cell), ["tokens", *style]
    left = np.zeros(len(names))
    for role, colour in zip(ROLES, (COLOURS[3], "#d5d8db", COLOURS[2]), strict=True):
        first = next(iter(style.values()))[f"tokens/{role}"]["value"]
        parts = 100 * np.array([first, *(row[f"gap/{role}"]["value"] for row in style.values())], float)
        axes.barh(range(len(names)), parts, left=left, color=colour, label=role)
        left = left + parts
    axes.set_yticks(range(len(names)), [name.replace(" - ", "\n- ").replace("_", " ") for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 100)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.12))
    entitle(axes, "|δ| by role of token, %")


def _position(figure: Figure, cell, position: dict[str, Any]) -> None:
    axes, names = axes_on(figure, cell), [name for name in ("gap", "content") if name in position]
    keys = ("position", "entropy", "both")
    for i, name in enumerate(names):
        r2 = [position[name]["r2"][key] for key in keys]
        value, low, high = (np.array([r[key] for r in r2], float) for key in ("value", "low", "high"))
        error = np.nan_to_num(np.stack([value - low, high - value]).clip(min=0))  # no interval with one problem
        axes.bar(np.arange(3) + 0.4 * i - 0.2, value, 0.36, yerr=error, capsize=2, color=COLOURS[i], label=name)
    axes.set_xticks(range(3), keys)
    axes.legend(frameon=False, fontsize=8)
    entitle(axes, "R² of the ranks out of fold")
