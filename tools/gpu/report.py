"""Turn the results of tools/gpu/run.sh into a page.

    python -m tools.gpu.report [RESULTS] > docs/measurements/gpu.md

Without results the page says that nothing has run, and lists the stages. A row's complaint is printed behind it.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import table
from tools.gpu.results import read
from tools.gpu.stages import RESULTS, stages

NEVER = "**Nothing of this project has ever run on a GPU.**"
PREPARED = "[gpu](../guides/gpu.md) says how to run these stages, and how their results become this page."


def page(directory: Path) -> str:
    """Return the Markdown page of the results in `directory`."""
    results = {stage.name: read(directory, stage.name) for stage in stages()}
    began = [result for result in results.values() if result]
    on_gpu = [result for result in began if result["device"] != "CPU"]
    lines = ["# On a GPU", ""]
    if not on_gpu:
        lines += [NEVER, PREPARED, ""]
    if began:
        first = min(began, key=lambda result: result["begun"])
        machines = sorted({f"{r['device']}, torch {r['torch']}, Python {r['python']}" for r in began})
        lines += [f"Measured on {first['begun'][:10]}: {'; '.join(machines)}. Command: [gpu](../guides/gpu.md).", ""]
    rows = []
    for stage in stages():
        result = results[stage.name]
        state, seconds = result.get("state", "not begun"), result.get("seconds")
        reason = result.get("reason", "").replace("|", "/")
        rows.append([stage.name, stage.about, state, "-" if seconds is None else f"{seconds:.0f}", reason])
    lines += [table(["stage", "what it tells", "state", "seconds", ""], rows, "---"), ""]
    for name, result in results.items():
        tables: dict[str, list[dict]] = {}
        for row in result.get("rows", []):
            tables.setdefault(row["table"], []).append(row)
        if tables:
            lines += [f"## {name}", ""]
        for title, content in tables.items():
            lines += [f"**{title}**", "", _table(content), ""]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("table", "complaint")))
    columns += ["complaint"] * any("complaint" in row for row in rows)
    body = ([_cell(row.get(column)) for column in columns] for row in rows)
    return table([column.replace("_", " ") for column in columns], body)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.3g}" if isinstance(value, float) and abs(value) < 1 else str(value)
    return text.replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    print(page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS), end="")
