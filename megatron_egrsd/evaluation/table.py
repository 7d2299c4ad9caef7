"""The table that `megatron-egrsd evaluate` prints: one row per number, one column per set."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megatron_egrsd.evaluation.summary import Estimate

_ACROSS = 4  # sets side by side; more sets get another table below
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
