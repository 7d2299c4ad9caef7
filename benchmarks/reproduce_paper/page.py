"""One page: every table and figure of the paper that has been made again, ours beside the published one.

page.html is for reading, numbers.json holds the same numbers. A missing run is shown as such, and never as 0.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from benchmarks.reproduce_paper import picture
from benchmarks.reproduce_paper.cells import MODELS, TABLES, TITLES, Setting, Table, methods
from benchmarks.reproduce_paper.claim import holder
from benchmarks.reproduce_paper.numbers import Number, Value, begun, fill, finished, values_of
from benchmarks.reproduce_paper.published import COLUMNS, of_method
from benchmarks.reproduce_paper.site import Site
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report import figures, mechanism
from megatron_egrsd.report.html import template
from megatron_egrsd.report.runs import read_run
from megatron_egrsd.report.scored_dump import dumps_of, load_scores
from megatron_egrsd.system.files import write_text

_GRADIENTS = ("opsd", "crisp", "egrsd", "cl_egrsd")  # of Figure A1
_DIGITS = {"avg_len": 0}  # of other columns: 2


def write_page(site: Site) -> Path:
    """Write numbers.json and page.html into the reproduction's directory, over older ones; returns the page's path."""
    numbers = fill(TABLES, site)
    states = {row.setting: state(row.setting, site) for table in TABLES for row in table.rows}
    write_text(site.output / "numbers.json", json.dumps(_as_json(numbers, states), indent=1, ensure_ascii=False) + "\n")
    page = site.output / "page.html"
    rendered = template("page.html", Path(__file__).parent).render(
        finished=sum(not s for s in states.values()),
        settings=len(states),
        failed={s.key: text for s, text in states.items() if text.startswith("failed")},
        unlike=unlike(site),
        tables=[_table(table, numbers[table.key], states) for table in TABLES],
        columns=COLUMNS,
        figures=[(key, title, caption, Markup(figures.to_svg(f))) for key, title, caption, f in _figures(site)],
    )
    write_text(page, rendered)
    return page


def state(setting: Setting, site: Site) -> str:
    """Return "" for a setting with a finished cell, else why there is none: one that failed, runs, or was never run."""
    if finished(setting, site):
        return ""
    found = begun(setting, site)
    for cell in found:
        if who := holder(site.directory(cell)):
            return f"runs on {who}"
    for cell in found:
        if reason := site.failure_of(cell):
            return f"failed: {reason}"
    return "not finished" if found else "not run"


def unlike(site: Site) -> list[str]:
    """Return in what the finished cells were not made as the paper says, a sentence each."""
    words: dict[str, set[str]] = {"trained with": set(), "evaluated with": set()}
    for table in TABLES:
        for row in table.rows:
            for cell in finished(row.setting, site):
                identity = json.loads((site.directory(cell) / "cell.json").read_text(encoding="utf-8"))
                words["trained with"].add(" ".join(identity["train"]))
                words["evaluated with"].add(" ".join(identity["evaluate"]))
                results = json.loads((site.evaluation_of(cell) / "results.json").read_text(encoding="utf-8"))
                for key, value in results["protocol"]["overridden"].items():
                    words["evaluated with"].add(f"{key} = {value}")
    return [f"{name} {', '.join(sorted(found - {''}))}" for name, found in words.items() if found - {""}]


def _table(table: Table, rows: list[dict[str, Number]], states: dict[Setting, str]) -> dict:
    shown = []
    for row, numbers in zip(table.rows, rows, strict=True):
        seeds = max(number.seeds for number in numbers.values())
        about = states[row.setting] or (f"{seeds} seeds" if seeds > 1 else "1 seed")
        cells = [_cell(column, number) for column, number in numbers.items()]
        shown.append({"label": row.label, "about": about, "cells": cells, "missing": bool(states[row.setting])})
    return {"key": table.key, "title": table.title, "note": table.note, "columns": table.columns, "rows": shown}


def _cell(column: str, number: Number) -> dict[str, object]:
    """Return the texts of a cell: ours, its interval, the paper's, the difference; "" for what there is not."""
    digits = _DIGITS.get(column, 2)
    ours, found = number.ours, number.difference
    return {
        "ours": f"{ours.value:,.{digits}f}" if ours else "",
        "interval": _interval(ours, min(digits, 1)),
        "paper": "" if number.paper is None else f"{number.paper:,.{digits}f}",
        "difference": f"{found.value:+,.{digits}f}".replace("-", "−") if found else "",
        "differs": number.differs,
    }


def _interval(value: Value | None, digits: int) -> str:
    if value is None or value.low is None:
        return ""
    return f"{value.low:,.{digits}f} to {value.high:,.{digits}f}".replace("-", "−")


def _figures(site: Site) -> Iterator[tuple[str, str, str, Figure]]:
    """Yield (key, title, caption, figure) of what there are numbers for."""
    for model, about in MODELS.items():
        found = methods(model)
        rows = {}
        for name, setting in found.items():
            ours, seeds = values_of(setting, site)
            paper = of_method(about.name, TITLES[name])
            rows[TITLES[name]] = {c: Number(ours.get(c), paper.get(c), seeds) for c in ("avg", "avg_len")}
        if drawn := picture.frontier(rows):
            yield (f"frontier-{model}", f"Accuracy against length, {about.name} (the paper's Figure 1)",
                   "Up and to the left is better. Filled: ours, with 95 % intervals. Hollow: the paper's, if its "
                   "length is published; a dotted line joins the two.", drawn)  # fmt: skip
        first = {name: finished(found[name], site)[:1] for name in _GRADIENTS}
        runs = {TITLES[name]: read_run(site.run_of(cell)) for name, cells in first.items() for cell in cells}
        if drawn := picture.gradient_norms(runs):
            yield (f"gradients-{model}", f"Gradient norms, {about.name} (the paper's Figure A1, on 8B)",
                   "Every step of the first seed. The paper's OPSD and CRISP stay mostly between 0.02 and 0.08, its "
                   "EGRSD and CL-EGRSD at about 0.035, with one step of EGRSD above the limit.", drawn)  # fmt: skip
        for cell in first["cl_egrsd"]:
            yield from _mechanism(site.run_of(cell), model, about.name)


def _mechanism(run: Path, model: str, name: str) -> Iterator[tuple[str, str, str, Figure]]:
    try:
        paths = dumps_of(run).values()
    except BadArgument:  # trained with dump_scores false
        return
    found = mechanism.measure([load_scores(path) for path in paths])
    yield (f"mechanism-{model}", f"Where the gate acts, {name} (the paper's Figure 4, on 4B)",
           f"{found.tokens:,} tokens that CL-EGRSD was trained on, γ {found.gamma:g}, W {found.window}. The paper's: "
           "held-out tokens, γ 0.3, W 5; the gap grows from 0.002 to 0.329 nats; lock 50.0 %, mid 27.0 % (+0.040), "
           "pivot 20.9 % (+0.111), fork 2.1 % (+0.053).",
           figures.mechanism(found.gap, found.weight, found.share, found.restored))  # fmt: skip


def _as_json(numbers: dict[str, list[dict[str, Number]]], states: dict[Setting, str]) -> dict:
    def number(n: Number) -> dict[str, object]:
        own = asdict(n.ours) if n.ours else {"value": None, "low": None, "high": None}
        found = n.difference
        return {"ours": own, "seeds": n.seeds, "paper": n.paper, "difference": asdict(found) if found else None}

    return {
        table.key: {
            "title": table.title,
            "note": table.note,
            "rows": [
                {"label": row.label, "setting": row.setting.key, "state": states[row.setting] or "finished",
                 "numbers": {column: number(n) for column, n in found.items()}}
                for row, found in zip(table.rows, numbers[table.key], strict=True)
            ],
        }
        for table in TABLES
    }  # fmt: skip
