"""Reports of a run: the table, the report page, the token page (docs/guides/report.md)."""

from pathlib import Path

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report.runs import Run, read_evaluations
from megatron_egrsd.report.table import summary_table

__all__ = ["plot_frontier", "read_evaluations", "summary_table"]


def plot_frontier(evaluations: list[dict], path: Path) -> None:
    """Draw a PNG: accuracy against mean response length, one point per evaluation, and both over the steps.

    An evaluation has "step" and the keys of summarize_rollouts. Raises BadArgument if there is none to draw.
    """
    from megatron_egrsd.report import figures

    points = sorted(figures.drawable(evaluations), key=lambda e: e["step"])
    if not points:
        raise BadArgument("there is no evaluation to draw; set data.evaluation")
    figures.save_png(figures.frontier([Run(path.parent.name, "", [], points)]), path)
