"""The mechanism of the gate on the tokens of scored dumps: the numbers and the picture of the paper's Figure 4.

Source: EGRSD (arXiv 2605.13255, section 5.5). The paper does not give the thresholds between its token regimes; the
medians and 70 % quantiles of the normalised entropy that are used here are ours.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.egrsd import EGRSD, confidence
from megatron_egrsd.report import figures
from megatron_egrsd.report.family import family
from megatron_egrsd.report.scored_dump import (
    ScoredRollout,
    dumped_tokens,
    dumps_of,
    load_scores,
    with_family_advantages,
)

REGIMES = ("lock", "mid", "pivot", "fork")
_LOW, _HIGH = 0.5, 0.7  # quantiles of Hhat that bound the regimes
# Figure 4 of the paper: Qwen3-4B, gamma 0.3, W 5, 5.5M held-out tokens.
PAPER_GAP = (0.00237, 0.329)  # nats, first and last decile
PAPER_WEIGHT = (1.0, 1.0, 1.0, 1.0, 1.0, 0.99, 0.97, 0.93, 0.895, 0.83)  # the first five are "about 1.00"
PAPER_SHARE = {"lock": 0.500, "mid": 0.270, "pivot": 0.209, "fork": 0.021}
PAPER_RESTORED = {"lock": 0.001, "mid": 0.040, "pivot": 0.111, "fork": 0.053}


@dataclass(frozen=True)
class Mechanism:
    """Means over all tokens. Deciles are those of the teacher's entropy, the first the surest; arrays are [10]."""

    tokens: int
    gamma: float
    window: int
    entropy: np.ndarray  # nats
    gap: np.ndarray  # |log p_T - log p_S|, nats
    weight: np.ndarray  # w omega of EGRSD
    share: dict[str, float]  # of the tokens, by regime
    restored: dict[str, float]  # weight that the lookahead gives back, by regime: omega^CL - omega


def regimes(normalized: np.ndarray, ahead: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return [T] indices into REGIMES from Hhat and Hhat^CL.

    lock: Hhat <= low. fork: both >= high. pivot: Hhat >= high and Hhat^CL <= low. mid: the rest.
    """
    lock, high_now = normalized <= low, normalized >= high
    fork, pivot = high_now & (ahead >= high), high_now & (ahead <= low)
    return np.select([lock, fork, pivot], [0, 3, 2], default=1)


def thresholds(normalized: np.ndarray) -> tuple[float, float]:
    """Return the (low, high) bounds of the regimes."""
    low, high = np.quantile(normalized, [_LOW, _HIGH])
    return float(low), float(high)


def measure(dumps: list[list[ScoredRollout]]) -> Mechanism:
    """Measure scored batches, each with the entropy scale of its own. BadArgument if no teacher has scored them."""
    if any(batch[0].teacher_entropy is None for batch in dumps):
        raise BadArgument(
            "the dump holds no teacher's scores: its objective runs none, and there is no gate to look at"
        )
    objective = family(dumps[0][0].objective)["cl_egrsd"]
    parts = [_batch(with_family_advantages(batch), objective) for batch in dumps]
    entropy, gap, weight, h, ahead, restored = (np.concatenate(column) for column in zip(*parts, strict=True))
    deciles = np.array_split(np.argsort(entropy, kind="stable"), 10)
    kind = regimes(h, ahead, *thresholds(h))
    members = {name: np.flatnonzero(kind == i) for i, name in enumerate(REGIMES)}

    def mean(values: np.ndarray, of: np.ndarray) -> float:
        return float(values[of].mean()) if len(of) else float("nan")

    return Mechanism(
        tokens=len(entropy),
        gamma=objective.attenuation,
        window=objective.lookahead,
        entropy=np.array([mean(entropy, of) for of in deciles]),
        gap=np.array([mean(gap, of) for of in deciles]),
        weight=np.array([mean(weight, of) for of in deciles]),
        share={name: len(of) / len(kind) for name, of in members.items()},
        restored={name: mean(restored, of) for name, of in members.items()},
    )


def _batch(scored: list[ScoredRollout], objective: ObjectiveConfig) -> tuple[np.ndarray, ...]:
    """Return (H, |delta|, w omega, Hhat, Hhat^CL, omega^CL - omega) of a batch's tokens, [T] each."""
    tokens, vocab_size = dumped_tokens(scored), scored[0].vocab_size
    entropy, teacher, student = tokens.teacher_entropy, tokens.teacher_log_prob, tokens.student_log_prob
    plain = confidence(entropy, tokens.cu_seqlens, replace(objective, lookahead=0), vocab_size=vocab_size)
    looking = confidence(entropy, tokens.cu_seqlens, objective, vocab_size=vocab_size)
    w = EGRSD(objective, history=scored[0].history).magnitude(tokens)
    gap, restored = (teacher - student).abs(), looking.gate - plain.gate
    columns = entropy, gap, w * plain.gate, looking.normalized_entropy, looking.lookahead_entropy, restored
    return tuple(column.double().numpy() for column in columns)


def table(found: Mechanism) -> str:
    """Return the numbers as text, the paper's beside them."""
    lines = [
        f"{found.tokens:,} response tokens, gamma {found.gamma:g}, W {found.window}",
        "",
        f"{'decile of teacher entropy':<28}{'H, nats':>10}{'|delta|, nats':>15}{'weight':>9}{'paper':>9}",
    ]
    rows = zip(found.entropy, found.gap, found.weight, PAPER_WEIGHT, strict=True)
    lines += [f"{i:<28}{h:>10.3f}{gap:>15.5f}{w:>9.3f}{paper:>9.3f}" for i, (h, gap, w, paper) in enumerate(rows, 1)]
    lines += [
        f"{'paper, deciles 1 and 10':<28}{'':>10}{f'{PAPER_GAP[0]:g}, {PAPER_GAP[1]:g}':>15}",
        "",
        f"{'regime':<10}{'share':>9}{'paper':>9}{'restored':>11}{'paper':>9}",
    ]
    for name in REGIMES:
        shares = f"{100 * found.share[name]:>7.1f} %{100 * PAPER_SHARE[name]:>7.1f} %"
        lines.append(f"{name:<10}{shares}{found.restored[name]:>11.3f}{PAPER_RESTORED[name]:>9.3f}")
    return "\n".join(lines)


def write_mechanism(target: Path, output: Path | None) -> tuple[str, Path]:
    """Measure a dump, or all dumps of a run, and draw the picture; returns the table and the picture's path.

    `output` is a .png file; default: mechanism.png in the run, or beside the dump. Raises BadArgument if there is no
    dump, or if no teacher has scored it, RunError if the picture cannot be written.
    """
    paths = [target] if target.is_file() else dumps_of(target).values()
    found = measure([load_scores(path) for path in paths])
    output = output or (target.parent if target.is_file() else target) / "mechanism.png"
    figures.save_png(figures.mechanism(found.gap, found.weight, found.share, found.restored), output)
    return table(found), output
