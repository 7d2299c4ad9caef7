"""The tables that `megatron-egrsd evaluate` prints: one row per number, one column per set; and the EGRSD paper's."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_egrsd.evaluation.protocol import PUBLISHED, SETS, summary_columns
from megatron_egrsd.evaluation.summary import Estimate

_ACROSS = 4  # sets side by side; more sets get another table below
TABLE_WIDTH = 120  # columns of a terminal, or of a log, in which the paper's table keeps every digit
_NAMES = {
    "accuracy": "accuracy (avg@k)",
    "truncated": "truncated responses",
    "states_answer": "responses that state an answer",
    "length": "response length in tokens",
    "length/right": "  of right responses",
    "length/wrong": "  of wrong responses",
    "thinking": "  thinking part",
    "answer": "  answer part",
}


def evaluation_table(title: str, results: dict[str, dict[str, Estimate]]) -> Group:
    """Build the table: shares in per cent, lengths in tokens."""
    names = list(results)
    return Group(
        *(_table(title, {n: results[n] for n in names[i : i + _ACROSS]}) for i in range(0, len(names), _ACROSS))
    )


def _table(title: str, results: dict[str, dict[str, Estimate]]) -> Table:
    caption = "[95 % interval]; lengths: mean [95 % interval], median, 95th percentile"
    table = Table(title=title, title_justify="left", caption=Text(caption), caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    for key in dict.fromkeys(key for result in results.values() for key in result):
        kind, _, part = key.rpartition("/")
        if part in ("median", "p95"):
            continue
        if part == "mean":
            cells = [_length(result, kind) for result in results.values()]
        else:
            cells = [_share(result.get(key)) for result in results.values()]
        table.add_row(Text(_NAMES.get(kind or key, key)), *map(Text, cells))
    return table


def _share(e: Estimate | None) -> str:
    if e is None:
        return "-"
    interval = "" if e.low is None else f" [{100 * e.low:.1f}, {100 * e.high:.1f}]"
    return f"{100 * e.value:.1f} %{interval}"


def _length(result: dict[str, Estimate], kind: str) -> str:
    mean = result.get(f"{kind}/mean")
    if mean is None:
        return "-"
    interval = "" if mean.low is None else f" [{mean.low:.0f}, {mean.high:.0f}]"
    return f"{mean.value:.1f}{interval}, {result[f'{kind}/median'].value:.0f}, {result[f'{kind}/p95'].value:.0f}"


def paper_table(
    results: dict[str, dict[str, Estimate]], models: list[str], overridden: dict[str, tuple[object, object]]
) -> Table:
    """Build the table of the EGRSD paper: this checkpoint above the published rows of `models`.

    `overridden` are the keys in which this evaluation is not the paper's, with (value, the paper's value).
    """
    table = Table(
        title="accuracy in %, as in the EGRSD paper",
        title_justify="left",
        caption=Text(deviations(overridden)) if overridden else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    for name in (*SETS.values(), "Avg", "AvgLen", "Eff"):
        table.add_column(name, justify="right", no_wrap=True)
    own = [f"{100 * results[name]['accuracy'].value:.2f}" if name in results else "-" for name in SETS]
    table.add_row("this checkpoint", *own, *_summary(paper_summary(results)))
    for model in models:
        table.add_section()
        for method, (accuracies, tokens) in PUBLISHED[model].items():
            columns = summary_columns(accuracies, None if tokens is None else [tokens])
            table.add_row(f"{model} {method}", *(f"{x:.2f}" for x in accuracies), *_summary(columns))
    return table


def paper_summary(results: dict[str, dict[str, Estimate]]) -> tuple[float | None, float | None, float | None]:
    """Return (Avg in per cent, AvgLen in tokens, Eff) of the protocol's sets; None each if a set is missing."""
    if not all(name in results for name in SETS):
        return None, None, None
    accuracies = [100 * results[name]["accuracy"].value for name in SETS]
    return summary_columns(accuracies, [results[name]["length/mean"].value for name in SETS])


def deviations(overridden: dict[str, tuple[object, object]]) -> str:
    """Return a sentence with the keys in which an evaluation is not the protocol's."""
    keys = ", ".join(f"{key} = {own} (not {value})" for key, (own, value) in overridden.items())
    return f"not as in the paper: {keys}"


def _summary(columns: tuple[float | None, float | None, float | None]) -> list[str]:
    return [
        "-" if value is None else form.format(value)
        for value, form in zip(columns, ("{:.2f}", "{:,.0f}", "{:.2f}"), strict=True)
    ]
