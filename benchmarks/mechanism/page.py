"""The tables of docs/measurements/mechanism.md, as Markdown, from the numbers of results.py."""

import math
from typing import Any

from benchmarks.measure import table
from benchmarks.mechanism.tokens import KINDS, ROLES
from megatron_egrsd.report.mechanism import PAPER_GAP, PAPER_RESTORED, PAPER_SHARE, PAPER_WEIGHT, REGIMES


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """Return every table by its name on the page."""
    main = found["reference"]
    return {
        "extent": _extent(found),
        "deciles": _deciles(found["figure_4"][main]),
        "regimes": _regimes(found["figure_4"][main]),
        "kinds": _kinds(found["kinds"][main]),
        "style": _style(found["style"]),
        "position": _position(found["position"]),
        "agreement": _agreement(found["position"]["agreement"]),
    }


def _extent(found: dict[str, Any]) -> str:
    head = ["context", "problems", "responses", "of them right", "tokens", "mean H, nats", "mean δ", "mean abs(δ)"]
    rows = [
        [name, *(f"{e[key]:,}" for key in ("problems", "responses", "right", "tokens")), number(e["entropy"]),
         number(e["delta"]), number(e["gap"])]
        for name, e in found["extent"].items()
    ]  # fmt: skip
    return table(head, rows)


def _deciles(figure: dict[str, Any]) -> str:
    gaps = {0: PAPER_GAP[0], 9: PAPER_GAP[1]}
    rows = [
        [str(i + 1), number(figure["entropy"][i]), number(figure["gap"][i]), number(gaps[i]) if i in gaps else "",
         number(figure["weight"][i]), number(PAPER_WEIGHT[i])]
        for i in range(10)
    ]  # fmt: skip
    return table(["decile of H", "mean H, nats", "mean abs(δ)", "paper", "mean w ω", "paper"], rows)


def _regimes(figure: dict[str, Any]) -> str:
    rows = [
        [name, percent(figure["share"][name]), percent(PAPER_SHARE[name]), number(figure["restored"][name]),
         number(PAPER_RESTORED[name])]
        for name in REGIMES
    ]  # fmt: skip
    return table(["regime", "share", "paper", "weight restored", "paper"], rows)


def _kinds(kinds: dict[str, dict[str, float]]) -> str:
    head = ["tokens", "share", "mean Ĥ", "mean ω, EGRSD", "mean ω, CL-EGRSD", "part of 1 - ω, EGRSD", "CL-EGRSD"]
    rows = [
        [name, percent(row["share"]), number(row["normalized"]), number(row["gate"]), number(row["looking_gate"]),
         percent(row["closed"]), percent(row["looking_closed"])]
        for name in KINDS
        for row in [kinds[name]]
    ]  # fmt: skip
    return table(head, rows)


def _style(style: dict[str, Any]) -> str:
    head = ["signal", "responses", "correlation with δ of the reference", *(f"on {role}" for role in ROLES),
            "mean on style, nats", "on task", "style / task", "style: more than the reference", "task"]  # fmt: skip
    tokens = (percent(next(iter(style.values()))[f"tokens/{role}"]["value"]) for role in ROLES)
    rows = [["the tokens themselves", "", "", *tokens, "", "", "", "", ""]]
    for name, row in style.items():
        rows.append([
            name, str(row["responses"]), number(row["correlation"]),
            *(bounds(row[f"gap/{role}"], percent) for role in ROLES),
            number(row["mean/style"]["value"]), number(row["mean/task"]["value"]), bounds(row["ratio"]),
            *(bounds(row[f"more/{role}"], percent) for role in ("style", "task")),
        ])  # fmt: skip
    return table(head, rows)


def _position(position: dict[str, Any]) -> str:
    titles = {"gap": "abs(δ)", "content": "abs(δ - δ of another solution)"}
    targets = [name for name in titles if name in position]
    rows = []
    for key in ("position", "entropy", "position given entropy", "entropy given position", "|entropy| - |position|"):
        label = f"Spearman, {key}".replace("|entropy| - |position|", "abs(entropy) - abs(position)")
        rows.append([label, *(bounds(position[name]["spearman"][key]) for name in targets)])
    for key in ("position", "entropy", "both", "entropy - position"):
        rows.append([f"R² out of fold, {key}", *(bounds(position[name]["r2"][key]) for name in targets)])
    for axis in ("position", "entropy"):
        for i in (0, 9):
            row = [number(position[name][f"by {axis}"][i]) for name in targets]
            rows.append([f"mean in decile {i + 1} of {axis}, nats", *row])
    return table(["", *(titles[name] for name in targets)], rows)


def _agreement(agreement: dict[str, Any]) -> str:
    rows = [
        [name, bounds(agreement[f"{name}/agree"], percent), bounds(agreement[f"{name}/position"]),
         bounds(agreement[f"{name}/entropy"])]
        for name in ("all", "right", "wrong")
    ]  # fmt: skip
    return table(["responses", "tokens that agree", "AUROC of position", "AUROC of entropy"], rows)


def bounds(interval: dict[str, float], text=None) -> str:
    """Return "value (low to high)", or a dash if there is no value."""
    text = text or number
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if not _there(value):
        return "-"
    if not _there(low):
        return text(value)
    ends = f"{text(low)} to {text(high)}"
    return f"{text(value)} ({ends.replace(' %', '', 1)})"


def number(value: float | None) -> str:
    return f"{value:.3g}" if _there(value) else "-"


def percent(value: float | None) -> str:
    return f"{100 * value:.1f} %" if _there(value) else "-"


def _there(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
