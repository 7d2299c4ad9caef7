"""Draw the picture of docs/measurements/results.md: accuracy against length of each objective, 95 % intervals."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.paired import difference
from benchmarks.validate_method.hypotheses import DOUBTING, EVALUATED, TINY, TITLES
from megatron_egrsd.report.figures import COLOURS, save_png

_PANELS = ((TINY, "tiny"), (DOUBTING, "doubting, half of the references wrong"))


def save(rows: dict, path: Path) -> None:
    """Save the picture of `rows` as results.collect returns them; settings without two seeds are left out."""
    figure = Figure(figsize=(9, 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for axes, (task, title) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for index, (name, label) in enumerate(TITLES.items()):
            seeds = list(rows.get(f"{task}/{name}", {}).values())
            if len(seeds) > 1:
                x, y = (difference(np.array([s[c] for s in seeds])) for c in ("length", "accuracy"))
                error = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
                axes.errorbar(x.mean, y.mean, **error, fmt="o", color=COLOURS[index], label=label, capsize=2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("mean response length, tokens")
        axes.grid(color="#e4e6e8")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left, *_ = figure.axes
    left.set_ylabel(f"held-out avg@{EVALUATED} after the last step")
    labels = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9)
    save_png(figure, path)
