"""OPSD (arXiv 2601.18734) and CRISP (arXiv 2603.05433) over the full vocabulary, written a second time in fp64.

With Hugging Face and PEFT; no line of the package is used. One rollout at a time, and whole distributions of both
models.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.reference.algorithm1 import final_weights, load_student, log_probs_of, trained, update

# (log p_T [T, V], log p_S [T, V]) -> [T]
Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def forward_kl(teacher: torch.Tensor, student: torch.Tensor, clip: float = float("inf")) -> torch.Tensor:
    return (teacher.exp() * (teacher - student)).clamp(max=clip).sum(-1)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


def train(
    model: Path,
    batches: list[list[dict]],
    divergence: Divergence,
    *,
    temperature: float,
    lr: float,
    adam_epsilon: float,
    clip_norm: float,
    adapter: Path | None = None,
    refresh: int = 0,
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Take one step on each batch: the mean over its rollouts of the mean divergence of their tokens.

    The teacher is the initial model, or every `refresh` steps a copy of the student.
    Returns (loss, gradient norm) of each step, and the final weights, or those of the `adapter`.
    """
    student, teacher = load_student(model, adapter), load_student(model).eval()
    optimizer = torch.optim.AdamW(trained(student), lr=lr, betas=(0.9, 0.999), eps=adam_epsilon, weight_decay=0.0)
    steps = []
    for batch in batches:
        loss = 0.0
        for rollout in batch:
            prompt, response = rollout["prompt"], rollout["response_ids"]
            with torch.no_grad():
                target = log_probs_of(teacher, prompt["teacher_ids"], response, temperature)
            own = log_probs_of(student, prompt["student_ids"], response, temperature)
            loss = loss + divergence(target, own).mean() / len(batch)
        steps.append(update(student, optimizer, loss, clip_norm))
        if refresh and len(steps) % refresh == 0:
            teacher.load_state_dict(student.state_dict())
    return steps, final_weights(student)
