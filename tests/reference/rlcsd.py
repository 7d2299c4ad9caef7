"""RLCSD (arXiv 2606.11709) written a second time in fp64, with Hugging Face and PEFT; no line of the package is used.

One rollout at a time. Each step is one update of the policy that sampled, so no ratio is clipped.
"""

import copy
from pathlib import Path

import torch

from tests.reference import groups
from tests.reference.algorithm1 import final_weights, load_student, log_probs_of, trained, update


def advantages(batch: list[dict]) -> list[float]:
    """Group advantages; 0 for a rollout whose teacher has nothing to read."""
    every = groups.advantages(batch)
    return [advantage if rollout["contexts"] else 0.0 for advantage, rollout in zip(every, batch, strict=True)]


def train(
    model: Path,
    batches: list[list[dict]],
    *,
    temperature: float,
    lr: float,
    adam_epsilon: float,
    clip_norm: float,
    tau: float,
    refresh: int,
    adapter: Path | None = None,
) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """Take one step on each batch; the teacher is a copy of the student, every `refresh` steps a new one.

    Returns (loss, gradient norm, share of selected tokens) of each step, and the final weights, or the `adapter`'s.
    """
    student = load_student(model, adapter)
    teacher = copy.deepcopy(student).eval()
    optimizer = torch.optim.AdamW(trained(student), lr=lr, betas=(0.9, 0.999), eps=adam_epsilon, weight_decay=0.0)
    steps = []

    def of_sampled(network, prompt: list[int], response: list[int]) -> torch.Tensor:
        return log_probs_of(network, prompt, response, temperature)[range(len(response)), response]

    for batch in batches:
        terms: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        for rollout, advantage in zip(batch, advantages(batch), strict=True):
            if not advantage:
                continue
            response = rollout["response_ids"]
            with torch.no_grad():
                right, *wrong = (of_sampled(teacher, prompt, response) for prompt in rollout["contexts"])
            own = of_sampled(student, rollout["prompt"]["student_ids"], response)
            for t, log_prob in enumerate(own):
                mixture = sum(float(row[t].exp()) for row in wrong) / len(wrong)
                step = 0.5 * torch.tanh((right[t] - torch.tensor(mixture, dtype=torch.float64).log()) / tau)
                selected = abs(float(step)) > 0.02
                weight = advantage + float(step) if selected else advantage
                weight = max(weight, 0.0) if advantage > 0 else min(weight, 0.0)
                corrected = min(float((log_prob.detach() - rollout["rollout_log_probs"][t]).exp()), 2.0)
                terms[selected].append(-corrected * weight * (log_prob - log_prob.detach()).exp())
        loss = sum(torch.stack(some).mean() for some in terms.values() if some)
        share = len(terms[True]) / sum(map(len, terms.values()))
        steps.append((*update(student, optimizer, loss, clip_norm), share))
        if len(steps) % refresh == 0:
            teacher.load_state_dict(student.state_dict())
    return steps, final_weights(student)
