"""The shapes a sample takes on its way: Problem -> Rollout -> ScoredRollout (-> packed MicroBatch, data/packing.py)."""

from dataclasses import dataclass, field

import torch


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


@dataclass
class ScoredRollout:
    """A rollout with the training engine's view of it; every tensor is fp32 [len(response_ids)], in nats."""

    rollout: Rollout
    advantage: float
    teacher_log_prob: torch.Tensor
    teacher_entropy: torch.Tensor
    student_log_prob: torch.Tensor | None = None  # None: taken from the training pass (one update a batch)
    fields: dict[str, torch.Tensor] = field(default_factory=dict)  # gate, weight, ... for dumps and the token page
