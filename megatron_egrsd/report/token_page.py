"""The token page: the rollouts of a scored dump in one HTML file that works offline, each token coloured by its weight.

This module computes all numbers; the page's script only shows them. They are the weights of each member of the family,
computed on the whole batch, and the weights of a user's own objective as the dump has recorded them, without running
it. All data is escaped, and the page's security policy allows no script but its own.
"""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from jinja2.utils import htmlsafe_json_dumps

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.egrsd import EGRSD
from megatron_egrsd.report.family import NAMES, family, member, settings, title
from megatron_egrsd.report.html import script, template
from megatron_egrsd.report.mechanism import REGIMES, regimes, thresholds
from megatron_egrsd.report.scored_dump import (
    ScoredRollout,
    batch_weights,
    dumped_tokens,
    dumps_of,
    full_colour,
    load_scores,
    with_family_advantages,
)
from megatron_egrsd.system.files import write_text

MAX_TOKENS = 150_000  # tokens per page that a browser can still show quickly


def page_data(scored: list[ScoredRollout], groups: list[int]) -> dict:
    """Return the data of the page's script for the rollouts of `groups`; weights are computed on the whole batch.

    For each token: student and teacher log-prob, delta, exp(D delta), side of the clip, both entropies, Hhat, Hhat^CL
    and the distance in tokens to its minimum, the regime, and for each objective w, omega and A w omega.
    """
    objective, has_teacher = scored[0].objective, scored[0].teacher_log_prob is not None
    members, trained = family(objective), member(objective)
    if not has_teacher:
        members = {"grpo": members["grpo"]}
    if trained == "run":
        members["run"] = objective
    scored = with_family_advantages(scored)
    weights = {name: _weights(scored, o) for name, o in members.items()}
    bounds = thresholds(np.concatenate([row["h"] for row in weights["cl_egrsd"]])) if has_teacher else ()
    return {
        "objectives": [{"id": id, "name": _names(objective)[id], "settings": settings(o)} for id, o in members.items()],
        "regimes": REGIMES,
        "bounds": bounds,
        "trained": trained,
        "scale": full_colour(row["weight"] for rows in weights.values() for row in rows),
        "clip": objective.ratio_clip,
        "lookahead": members["cl_egrsd"].lookahead if has_teacher else 0,
        "rollouts": [
            _tokens(r, {name: rows[i] for name, rows in weights.items()}, bounds)
            for i, r in enumerate(scored)
            if r.group in groups
        ],
    }


def _names(objective: ObjectiveConfig) -> dict[str, str]:
    """Return the names of the family's members, and of the run itself if it is none of them."""
    names = {name: NAMES[name] for name in family(objective)}
    if objective.preset == "rlsd":  # a gate switched off, with other settings
        names["gate_off"] = NAMES["rlsd"]
    if member(objective) == "run":
        names["run"] = f"{title(objective)} (this run)" if objective.function else NAMES["run"]
    return names


def _weights(scored: list[ScoredRollout], objective: ObjectiveConfig) -> list[dict[str, np.ndarray]]:
    """Return omega and weight of each rollout; of a member of the family also w, and with a teacher ratio, h, h_ahead.

    These are exp(D delta), Hhat and Hhat^CL. Of another objective omega and weight are recorded, and the divergence's
    part of the loss counts as weight.
    """
    if objective.function:
        added = [0.0 if r.divergence is None else r.divergence for r in scored]
        return [{"omega": r.gate, "weight": r.weight + more} for r, more in zip(scored, added, strict=True)]
    tokens, lengths = dumped_tokens(scored), [len(r.response_ids) for r in scored]
    weights = batch_weights(tokens, objective, scored[0].vocab_size, scored[0].history)
    columns = {"w": torch.ones_like(weights["weight"]), "omega": weights["gate"], "weight": weights["weight"]}
    if tokens.teacher_log_prob is not None:
        built_in = EGRSD(objective, history=scored[0].history)
        columns["ratio"], columns["w"] = built_in.ratio(tokens), built_in.magnitude(tokens)
        columns["h"], columns["h_ahead"] = weights["normalized_entropy"], weights["lookahead_entropy"]
    split = {name: column.split(lengths) for name, column in columns.items()}
    return [{name: parts[i].numpy() for name, parts in split.items()} for i in range(len(scored))]


def _tokens(r: ScoredRollout, weights: dict[str, dict[str, np.ndarray]], bounds: tuple[float, ...]) -> dict:
    columns = {"student": r.student_log_prob, "student_entropy": r.student_entropy}
    if r.teacher_log_prob is not None:
        look = weights["cl_egrsd"]
        ratio = look["ratio"]
        columns |= {
            "teacher": r.teacher_log_prob,
            "teacher_entropy": r.teacher_entropy,
            "delta": r.teacher_log_prob - r.student_log_prob,
            "ratio": ratio,
            "clipped": np.sign(ratio - 1) * (abs(ratio - 1) > r.objective.ratio_clip),
            "h": look["h"],
            "h_ahead": look["h_ahead"],
            "offset": _offset(look["h"], look["h_ahead"]),
            "regime": regimes(look["h"], look["h_ahead"], *bounds),
        }
    row: dict[str, Any] = {name: _rounded(values) for name, values in columns.items()}
    row["objectives"] = {
        name: {key: _rounded(w[key]) for key in ("w", "omega", "weight") if key in w} for name, w in weights.items()
    }
    return row | {"advantage": r.advantage, "length": len(r.response_ids), "right": r.right}


def _offset(h: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Return the distance in tokens to the minimum of Hhat ahead, the nearest if several are equal; [T] fp32."""
    offset, found = np.zeros(len(h), np.float32), h == ahead
    for k in range(1, len(h)):
        if found.all():
            break
        here = ~found[:-k] & (h[k:] == ahead[:-k])
        offset[:-k][here], found[:-k][here] = k, True
    return offset


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round to four decimals, fp32, contiguous: orjson writes few characters then, and null for non-finite values."""
    return np.ascontiguousarray(np.round(values, 4) + 0.0, dtype=np.float32)


def render(scored: list[ScoredRollout], source: str, groups: list[int] | None = None) -> str:
    """Return the HTML page of a dump with `groups`; by default the first that fit MAX_TOKENS, and the page says so.

    Raises BadArgument if the dump does not hold a group.
    """
    present = list(dict.fromkeys(r.group for r in scored))
    if unknown := [g for g in groups or [] if g not in present]:
        raise BadArgument(f"{source} holds no group {unknown[0]}; it holds {present[0]} to {present[-1]}")
    shown = groups or _fitting(scored, present)
    data = page_data(scored, shown)
    rollouts = [r for r in scored if r.group in shown]
    return template("tokens.html").render(
        source=source,
        groups=[(g, [(i, r) for i, r in enumerate(rollouts) if r.group == g]) for g in present if g in shown],
        hidden=len(present) - len(shown),
        longest=max(len(r.response_ids) for r in rollouts),
        names=_names(scored[0].objective),
        available={o["id"]: o["settings"] for o in data["objectives"]},
        data=data,
        json=htmlsafe_json_dumps(data, dumps=lambda o: orjson.dumps(o, option=orjson.OPT_SERIALIZE_NUMPY).decode()),
        **script("tokens.js"),
    )


def _fitting(scored: list[ScoredRollout], present: list[int]) -> list[int]:
    chosen, tokens = [], 0
    for group in present:
        tokens += sum(len(r.response_ids) for r in scored if r.group == group)
        if chosen and tokens > MAX_TOKENS:
            break
        chosen.append(group)
    return chosen


def find_dump(target: Path, step: int | None) -> Path:
    """Return the dump of `target`: a file, or a run's newest or that of `step`. Raises BadArgument if it is missing."""
    if target.is_file():
        if step is not None:
            raise BadArgument(f"--step chooses among the dumps of a run, but {target} is one file")
        return target
    found = dumps_of(target)
    if step is not None and step not in found:
        raise BadArgument(f"{target} holds no scores of step {step}; there are {min(found)} to {max(found)}")
    return found[max(found) if step is None else step]


def write_token_page(target: Path, output: Path | None, step: int | None, groups: list[int] | None) -> Path:
    """Write the page of a dump or run and return its path: `output`, or beside the dump's directory or file."""
    dump = find_dump(target, step)
    scored = load_scores(dump)
    if output is None:
        output = dump.with_suffix(".html") if target.is_file() else target / f"tokens_{dump.stem}.html"
    html = render(scored, f"{target.resolve().name}, step {scored[0].step}", groups)
    write_text(output, html)
    return output
