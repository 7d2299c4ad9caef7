"""SDPO (arXiv 2601.20802) and SRPO (arXiv 2604.02288) written a second time in fp64, with Hugging Face and PEFT.

No line of the package is used. One rollout at a time. Each step is one update of the policy that sampled, so no ratio
is clipped. The teacher is a moving average of the student.
"""

import copy
import math
from pathlib import Path

import torch

from tests.reference.algorithm1 import final_weights, load_student, log_probs_of, trained, update
from tests.reference.groups import advantages


def jsd(teacher: torch.Tensor, student: torch.Tensor, k: int) -> torch.Tensor:
    """Of the student's k likeliest tokens and the rest as one, at each position: log-probs [T, V] of both -> [T]."""
    best = student.topk(k, dim=-1).indices
    p, q = (x.gather(-1, best).exp() for x in (teacher, student))
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    m = (p + q) / 2
    return (p * (p / m).log() + q * (q / m).log()).sum(-1) / 2


def train(
    model: Path,
    batches: list[list[dict]],
    *,
    reinforces: bool,
    temperature: float,
    lr: float,
    adam_epsilon: float,
    clip_norm: float,
    top_k: int,
    decay: float,
    adapter: Path | None = None,
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Take one step on each batch; with `reinforces` of SRPO, else of SDPO.

    Returns (loss, gradient norm) of each step, and the final weights, or those of the `adapter`.
    """
    student = load_student(model, adapter)
    teacher = copy.deepcopy(student).eval()
    optimizer = torch.optim.AdamW(trained(student), lr=lr, betas=(0.9, 0.999), eps=adam_epsilon, weight_decay=0.0)
    steps = []
    for batch in batches:
        every, pulls, weights, rewards = 0, [], [], []
        for rollout, advantage in zip(batch, advantages(batch), strict=True):
            response, contexts = rollout["response_ids"], rollout["contexts"]
            every += len(response)
            own = log_probs_of(student, rollout["prompt"]["student_ids"], response, temperature)
            log_prob = own[range(len(response)), response]
            sampled = torch.tensor(rollout["rollout_log_probs"], dtype=torch.float64)
            correction = (log_prob.detach() - sampled).exp().clamp(max=2.0)
            if reinforces and advantage > 0:
                rewards.append((correction * advantage * (log_prob - log_prob.detach()).exp()).sum())
            elif contexts and (advantage < 0 or not reinforces):
                with torch.no_grad():
                    target = log_probs_of(teacher, contexts[0], response, temperature)
                pulls.append(correction * jsd(target, own, top_k))
                weights += [math.exp(float((row.exp() * row).sum())) if reinforces else 1.0 for row in target]
        weight = torch.tensor(weights, dtype=torch.float64)
        pull = (weight / weight.mean() * torch.cat(pulls)).sum()
        loss = (pull - sum(rewards)) / every if reinforces else pull / len(weights)
        steps.append(update(student, optimizer, loss, clip_norm))
        with torch.no_grad():
            for average, now in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(now, 1 - decay)
    return steps, final_weights(student)
