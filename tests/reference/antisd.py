"""AntiSD (arXiv 2605.11609, algorithm 1) written a second time in fp64, with Hugging Face and PEFT.

No line of the package is used. One rollout at a time, and for the weights one token at a time. Each step is one update
of the policy that sampled, so no ratio is clipped. The teacher is the student, with another prompt.
"""

import math
import statistics
from pathlib import Path

import torch

from tests.reference.algorithm1 import final_weights, load_student, log_probs_of, trained, update
from tests.reference.groups import advantages


def train(
    model: Path,
    batches: list[list[dict]],
    *,
    temperature: float,
    lr: float,
    adam_epsilon: float,
    clip_norm: float,
    warmup: int,
    collapse: float,
) -> tuple[list[tuple[float, float, float, float]], dict[str, torch.Tensor]]:
    """Take one step on each batch.

    Returns (loss, gradient norm, gate, median entropy of the teacher) of each step, and the final weights.
    """
    student = load_student(model)
    optimizer = torch.optim.AdamW(trained(student), lr=lr, betas=(0.9, 0.999), eps=adam_epsilon, weight_decay=0.0)
    steps, medians, gate = [], [], 1.0
    for number, batch in enumerate(batches):
        scored, entropies = [], []
        for rollout in batch:
            response = rollout["response_ids"]
            context = rollout["contexts"][0] if rollout["contexts"] else rollout["prompt"]["student_ids"]
            with torch.no_grad():
                target = log_probs_of(student, context, response, temperature)
            entropies += [-float((row.exp() * row).sum()) for row in target]
            own = log_probs_of(student, rollout["prompt"]["student_ids"], response, temperature)
            places = range(len(response)), response
            scored.append((target[places], own[places]))
        median = statistics.median(entropies)
        if number < warmup:
            medians.append(median)
        elif median >= statistics.mean(medians):
            gate = 1.0
        elif median < collapse * statistics.mean(medians):
            gate = 0.0
        strength = 0.5 * gate if number >= warmup else 0.0
        loss = 0.0
        for advantage, (target, own) in zip(advantages(batch), scored, strict=True):
            for theirs, log_prob in zip(target, own, strict=True):
                gap = float(theirs - log_prob.detach())
                weight = advantage - strength * 0.5 * (math.log1p(math.exp(gap)) - math.log(2))
                loss = loss - weight * (log_prob - log_prob.detach()).exp() / len(entropies)
        moved = update(student, optimizer, loss, clip_norm)
        steps.append((*moved, gate if number >= warmup else 0.0, median))
    return steps, final_weights(student)
