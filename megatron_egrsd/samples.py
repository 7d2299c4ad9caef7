"""The shapes a sample takes on its way: Problem -> Prompt -> Rollout (-> Sequence -> MicroBatch, data/packing.py)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_egrsd.errors import BadArgument, RunError


@dataclass(frozen=True)
class Problem:
    """One verifiable problem. `solution` is the privileged context; it is empty where the dataset has none."""

    id: str
    problem: str
    answer: str
    solution: str = ""


@dataclass(frozen=True)
class Prompt:
    """A problem as token ids: what the student reads, and what the privileged teacher reads."""

    problem: Problem
    student_ids: list[int]
    teacher_ids: list[int]


@dataclass(frozen=True)
class Rollout:
    """One response sampled from the student by the rollout engine.

    `response_ids` ends with the end-of-turn token when `finish_reason == "stop"`. `rollout_log_probs[t]` is the
    rollout engine's log-probability (nats, at the sampling temperature) of `response_ids[t]`; it never enters the
    log-ratio of the objective. `group` is the index of the prompt in its batch: rollouts of one prompt share it.
    """

    prompt: Prompt
    group: int
    response_ids: list[int]
    rollout_log_probs: list[float]
    finish_reason: str  # "stop" | "length"
    weight_version: int
    text: str = ""
    reward: float = 0.0


def save_rollouts(rollouts: list[Rollout], path: Path) -> None:
    """One JSON object a line, written to a temporary name and renamed; RunError where `path` exists already."""
    if path.exists():
        raise RunError(f"{path} exists already; rollouts are never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            file.write(json.dumps(asdict(rollout), ensure_ascii=False) + "\n")
    temporary.rename(path)


def load_rollouts(path: Path) -> list[Rollout]:
    """What `save_rollouts` wrote. BadArgument naming the line that is not a rollout."""
    rollouts = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                prompt = row.pop("prompt")
                problem = Problem(**prompt.pop("problem"))
                rollouts.append(Rollout(prompt=Prompt(problem=problem, **prompt), **row))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadArgument(f"{path}, line {number}: not a rollout as save_rollouts writes it") from None
    return rollouts
