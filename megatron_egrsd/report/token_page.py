"""The token page: the rollouts of a scored dump in one HTML file that works offline, each token coloured by its weight.

All numbers are computed here, by objective.token_weights on the whole batch and once for each member of the family;
the page's script only shows them. Whatever comes from data is escaped, and the page's security policy lets no script
run but its own.
"""

import base64
import hashlib
from pathlib import Path

import numpy as np
import orjson
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report.html import TEMPLATES, template, write_page
from megatron_egrsd.report.objectives import NAMES, family, member, settings
from megatron_egrsd.scores import ScoredRollout, batch_weights, load_scores

MAX_TOKENS = 150_000  # of one page: a browser stays quick with them


def page_data(scored: list[ScoredRollout], groups: list[int]) -> dict:
    """What the page's script reads, for the rollouts of `groups`; weights come from the whole batch.

    For each token: student and teacher log-prob, ratio exp(sign(A) (log pi_T - log pi_S)), side of the clip, the
    entropies of both, h, h after the lookahead and how far ahead that lies, and for each objective magnitude, gate
    and weight.
    """
    objective, has_teacher = scored[0].objective, scored[0].teacher_log_prob is not None
    members, trained = family(objective), member(objective)
    if not has_teacher:
        members = {"grpo": members["grpo"]}
    elif trained == "run":
        members["run"] = objective
    weights = {name: _weights(scored, o) for name, o in members.items()}
    sizes = abs(np.nan_to_num(np.concatenate([row["w"] for rows in weights.values() for row in rows])))
    return {
        "objectives": [{"id": id, "name": NAMES[id], "settings": settings(o)} for id, o in members.items()],
        "trained": trained,
        "scale": float(np.quantile(sizes[sizes > 0], 0.95)) if sizes.any() else 1.0,
        "clip": objective.ratio_clip,
        "lookahead": members["cl_egrsd"].lookahead if has_teacher else 0,
        "rollouts": [
            _tokens(r, {name: rows[i] for name, rows in weights.items()})
            for i, r in enumerate(scored)
            if r.group in groups
        ],
    }


def _weights(scored: list[ScoredRollout], objective: ObjectiveConfig) -> list[dict[str, np.ndarray]]:
    """Of each rollout under `objective`: magnitude m, gate g, weight w, normalised entropy h, its minimum ahead a."""
    lengths = [len(r.response_ids) for r in scored]
    if scored[0].teacher_log_prob is None:
        one = [np.ones(n) for n in lengths]
        return [{"m": o, "g": o, "w": r.advantage * o} for o, r in zip(one, scored, strict=True)]
    names = ("teacher_log_prob", "teacher_entropy", "student_log_prob")
    packed = [np.concatenate([getattr(r, name) for r in scored]) for name in names]
    w, ahead, _ = batch_weights([r.advantage for r in scored], *packed, lengths, objective, scored[0].vocab_size)
    columns = {"m": w.magnitude, "g": w.gate, "w": w.weight, "h": w.normalized_entropy, "a": ahead}
    split = {name: column.split(lengths) for name, column in columns.items()}
    return [{name: parts[i].numpy() for name, parts in split.items()} for i in range(len(scored))]


def _tokens(r: ScoredRollout, weights: dict[str, dict[str, np.ndarray]]) -> dict:
    columns = {"student": r.student_log_prob, "student_entropy": r.student_entropy}
    if r.teacher_log_prob is not None:
        log_ratio, look = r.teacher_log_prob - r.student_log_prob, weights["cl_egrsd"]
        with np.errstate(over="ignore"):
            ratio = np.exp(np.sign(r.advantage) * log_ratio)
        columns |= {
            "teacher": r.teacher_log_prob,
            "teacher_entropy": r.teacher_entropy,
            "log_ratio": log_ratio,
            "ratio": ratio,
            "clipped": np.sign(ratio - 1) * (abs(ratio - 1) > r.objective.ratio_clip),
            "h": look["h"],
            "h_ahead": look["a"],
            "offset": _offset(look["h"], look["a"]),
        }
    row = {name: _rounded(values) for name, values in columns.items()}
    row["objectives"] = {name: {key: _rounded(w[key]) for key in ("m", "g", "w")} for name, w in weights.items()}
    return row | {"advantage": r.advantage, "length": len(r.response_ids), "right": r.reward > 0.5}


def _offset(h: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """How many tokens ahead of each the minimum of h lies, the nearest where several are equal; [T] fp32."""
    offset, found = np.zeros(len(h), np.float32), h == ahead
    for k in range(1, len(h)):
        if found.all():
            break
        here = ~found[:-k] & (h[k:] == ahead[:-k])
        offset[:-k][here], found[:-k][here] = k, True
    return offset


def _rounded(values: np.ndarray) -> np.ndarray:
    """Four decimals, fp32, contiguous: what orjson writes in few characters. What is not finite becomes null."""
    return np.ascontiguousarray(np.round(values, 4) + 0.0, dtype=np.float32)


def render(scored: list[ScoredRollout], source: str, groups: list[int] | None = None) -> str:
    """The page of a dump. `groups`: those to show; without it the first that fit MAX_TOKENS, and the page says so.

    Raises BadArgument for a group that the dump does not hold.
    """
    present = list(dict.fromkeys(r.group for r in scored))
    if unknown := [g for g in groups or [] if g not in present]:
        raise BadArgument(f"{source} holds no group {unknown[0]}; it holds {present[0]} to {present[-1]}")
    shown = groups or _fitting(scored, present)
    data = page_data(scored, shown)
    rollouts = [r for r in scored if r.group in shown]
    script = (TEMPLATES / "tokens.js").read_text(encoding="utf-8")
    return template("tokens.html").render(
        source=source,
        groups=[(g, [(i, r) for i, r in enumerate(rollouts) if r.group == g]) for g in present if g in shown],
        hidden=len(present) - len(shown),
        longest=max(len(r.response_ids) for r in rollouts),
        names={k: v for k, v in NAMES.items() if k != "run" or data["trained"] == "run"},
        available={o["id"]: o["settings"] for o in data["objectives"]},
        data=data,
        json=htmlsafe_json_dumps(data, dumps=lambda o: orjson.dumps(o, option=orjson.OPT_SERIALIZE_NUMPY).decode()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
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
    """The dump that `target` names: a file, or a run's newest or that of `step`. BadArgument where there is none."""
    if target.is_file():
        if step is not None:
            raise BadArgument(f"--step chooses among the dumps of a run, but {target} is one file")
        return target
    found = {int(p.stem.removeprefix("step_")): p for p in target.glob("scores/step_*.jsonl")}
    if not found:
        raise BadArgument(f"{target} holds no scored rollouts; train with dump_scores true")
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
    write_page(html, output)
    return output
