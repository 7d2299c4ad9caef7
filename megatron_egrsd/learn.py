"""One step of the method on a batch of rollouts: direction, teacher, gate, update. Algorithm and engine meet here."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from megatron_egrsd.config import Config, ObjectiveConfig
from megatron_egrsd.data.packing import MicroBatch, Sequence
from megatron_egrsd.data.samples import Rollout
from megatron_egrsd.errors import BadUpdate
from megatron_egrsd.objectives.interface import Objective, Tokens
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.objectives.loss import loss_normalizer, policy_loss
from megatron_egrsd.objectives.signal import rollout_advantages

if TYPE_CHECKING:
    from megatron_egrsd.engine.engine import Engine, Scores

# (advantage of every rollout, this data-parallel rank's student scores, its teacher scores or None)
Record = Callable[[list[float], "dict[int, Scores]", "dict[int, Scores] | None"], None]

_COLUMNS = ("advantage", "teacher_log_prob", "teacher_entropy", "student_log_prob", "student_entropy")
_PREPARED = "prepared/"


def learn(engine: "Engine", rollouts: list[Rollout], config: Config, record: Record | None = None) -> dict[str, float]:
    """Train on `rollouts` (all of them, on every rank) and return the step's metrics, equal on every rank.

    With one update per batch the policy that is updated is the one that sampled, so log pi_old is the training pass's
    own log-prob and no separate student pass is run. Rollouts of advantage 0 carry no gradient and are not trained, but
    for a KL penalty.
    `record` gets the scores of all rollouts before the update, on every rank; it costs a student pass of its own where
    there is one update.
    """
    objective, started = load_objective(config.objective), time.perf_counter()
    advantage = rollout_advantages(rollouts, objective)
    students = [Sequence(r.prompt.student_ids, r.response_ids) for r in rollouts]
    teachers = [Sequence(r.prompt.teacher_ids, r.response_ids) for r in rollouts]

    has_gradient = [bool(a or config.objective.kl_coef) for a in advantage]
    minibatches = []
    share = config.rollout.prompts_per_step // config.optimizer.updates_per_batch
    for first in range(0, config.rollout.prompts_per_step, share):
        members = [i for i, r in enumerate(rollouts) if first <= r.group < first + share]
        scored = [len(teachers[i]) for i in members]
        trained = [len(students[i]) if has_gradient[i] else 0 for i in members]
        minibatches.append([[members[i] for i in part] for part in engine.partition(scored, trained)])
    everyone = [[i for m in minibatches for i in m[rank]] for rank in range(engine.data_parallel)]
    own = {i: rollouts[i] for i in everyone[engine.data_parallel_rank]}

    known = len(minibatches) > 1 or objective.needs_student
    teacher, student = _scores(engine, teachers if objective.needs_teacher else [],
                               students if known or record else [], everyone)  # fmt: skip
    reference = engine.score(students, everyone, "reference") if config.objective.kl_coef else None
    if record:
        record(advantage, student, teacher)
    fields = _prepare(engine, objective, own, advantage, teacher, student if known else None)
    for i, scores in (reference or {}).items():
        fields[i]["reference_log_prob"] = scores.log_prob
    score_seconds = time.perf_counter() - started

    sums: dict[str, float] = {}
    for minibatch in minibatches:
        members = [i for part in minibatch for i in part]
        num_tokens = sum(len(rollouts[i].response_ids) for i in members)
        for i in minibatch[engine.data_parallel_rank]:
            length = torch.tensor([len(rollouts[i].response_ids)])
            normalizer = loss_normalizer(length, config.objective, num_tokens=num_tokens, num_sequences=len(members))
            students[i] = replace(students[i], fields=fields[i] | {"normalizer": normalizer})
        trained = [[i for i in part if has_gradient[i]] for part in minibatch]
        if any(trained):
            try:
                update = engine.train_step(
                    students, trained, lambda lp, h, batch: _loss(lp, h, batch, objective), lambda s: _refuse(s, config)
                )
                update["updates"] = 1
            except BadUpdate as bad:
                update = bad.sums | {f"skipped/{bad.kind}": 1, "skipped": 1}
            sums = {k: sums.get(k, 0.0) + v for k, v in update.items()} | {"lr": update.get("lr", 0.0)}
    return _metrics(rollouts, sums, config.objective) | {
        "time/score": score_seconds,
        "time/train": time.perf_counter() - started - score_seconds,
    }


def _scores(
    engine: "Engine", teachers: list[Sequence], students: list[Sequence], partition: list[list[int]]
) -> "tuple[dict[int, Scores] | None, dict[int, Scores] | None]":
    """Scores of teacher and student, None for what is empty: one pass where both have the same weights.

    One pass fills and drains the pipeline once instead of twice.
    """
    if not (teachers and students and engine.config.teacher.weights == "live"):
        return (engine.score(teachers, partition, "teacher") if teachers else None,
                engine.score(students, partition) if students else None)  # fmt: skip
    n = len(teachers)
    both = engine.score(teachers + students, [part + [n + i for i in part] for part in partition])
    return {i: s for i, s in both.items() if i < n}, {i - n: s for i, s in both.items() if i >= n}


@torch.no_grad()
def _prepare(
    engine: "Engine",
    objective: Objective,
    own: dict[int, Rollout],
    advantage: list[float],
    teacher: "dict[int, Scores] | None",
    student: "dict[int, Scores] | None",
) -> dict[int, dict[str, torch.Tensor]]:
    """The fields of each of this rank's rollouts: its scores, and what the objective makes of the whole batch."""
    lengths = [len(r.response_ids) for r in own.values()]
    cu_seqlens = torch.tensor([0, *lengths], device=engine.device).cumsum(0, dtype=torch.int32)
    signal = torch.tensor([advantage[i] for i in own], device=engine.device)
    columns = {"advantage": signal.repeat_interleave(cu_seqlens.diff())}
    for name, scores in (("teacher", teacher), ("student", student)):
        if scores is not None:
            columns[f"{name}_log_prob"] = torch.cat([scores[i].log_prob for i in own])
            columns[f"{name}_entropy"] = torch.cat([scores[i].entropy for i in own])
    tokens = Tokens(cu_seqlens, **columns)
    prepared = objective.prepare(tokens, vocab_size=engine.arch.vocab_size, group=engine.data_parallel_group)
    columns |= {_PREPARED + name: values for name, values in prepared.items()}
    columns["rollout_log_prob"] = torch.tensor([x for r in own.values() for x in r.rollout_log_probs])
    parts = {name: values.split(lengths) for name, values in columns.items()}
    return {i: {name: part[n] for name, part in parts.items()} for n, i in enumerate(own)}


def _loss(
    log_prob: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch, objective: Objective
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy loss of one micro-batch, all tensors [R], and sums over its tokens; those with a "/" become means."""
    f = batch.fields
    with torch.no_grad():
        # Without scores of its own, the student before the update is the one that is being trained.
        scores = {"student_log_prob": log_prob.detach(), "student_entropy": entropy.detach()}
        scores |= {name: f[name] for name in _COLUMNS if name in f}
        prepared = {k.removeprefix(_PREPARED): v for k, v in f.items() if k.startswith(_PREPARED)}
        tokens = Tokens(batch.response_cu_seqlens, **scores, fields=prepared)
        weight = objective.weight(tokens)
        sums = {name: values.sum() for name, values in objective.metrics(tokens).items()}
    old, rollout, reference = tokens.student_log_prob, f["rollout_log_prob"], f.get("reference_log_prob")
    others = {"rollout_log_prob": rollout, "reference_log_prob": reference}
    result = policy_loss(log_prob, old, weight, f["normalizer"], objective.config, **others)
    if tokens.teacher_log_prob is not None:
        sums["teacher/entropy"] = tokens.teacher_entropy.sum()
        sums["weight/log_ratio"] = (tokens.teacher_log_prob - old).sum()
    sums |= {
        "loss": result.loss.detach(),
        "tokens": result.tokens,
        "student/entropy": entropy.detach().sum(),
        "loss/clip_share": result.clipped,
        "sync/log_prob_difference": (old - rollout).abs().sum(),
        "weight/abs_mean": weight.abs().sum(),
        "loss/importance": result.importance,
        "loss/kl": result.kl,
    }
    return result.loss, sums


def _refuse(sums: dict[str, float], config: Config) -> str:
    """Why an update with these sums must not be made; empty where nothing speaks against it."""
    difference = sums["sync/log_prob_difference"]
    if not math.isfinite(difference):
        return "log_prob"
    if not math.isfinite(sums["loss"]):
        return "loss"
    return "disagreement" if difference > config.log_prob_limit * sums["tokens"] else ""


def rollout_metrics(rollouts: list[Rollout], config: ObjectiveConfig) -> dict[str, float]:
    """What the rollouts alone say."""
    lengths, n = [len(r.response_ids) for r in rollouts], len(rollouts)
    return {
        "reward/mean": sum(r.reward for r in rollouts) / n,
        "reward/failed": float(sum(bool(r.reward_error) for r in rollouts)),
        "accuracy": sum(r.reward > 0.5 for r in rollouts) / n,
        "response/length": sum(lengths) / n,
        "response/truncated": sum(r.finish_reason == "length" for r in rollouts) / n,
        "batch/tokens": float(sum(lengths)),
        "batch/degenerate_share": sum(a == 0 for a in rollout_advantages(rollouts, load_objective(config))) / n,
    }


def _metrics(rollouts: list[Rollout], sums: dict[str, float], config: ObjectiveConfig) -> dict[str, float]:
    """Sums over trained tokens into means, with what the rollouts alone say."""
    metrics = rollout_metrics(rollouts, config) | {"optimizer/updates": float(sums.get("updates", 0))}
    tokens, updates = max(sums.get("tokens", 0.0), 1.0), max(sums.get("updates", 0), 1)
    if "tokens" not in sums:
        return metrics
    skipped = {k: v for k, v in sums.items() if k.startswith("skipped/")}
    metrics |= {k: v / tokens for k, v in sums.items() if "/" in k} | skipped
    metrics |= {"loss/policy": sums["loss"] / updates, "optimizer/skipped": float(sums.get("skipped", 0))}
    if "grad_norm" in sums:
        metrics |= {"optimizer/grad_norm": sums["grad_norm"] / updates, "optimizer/lr": sums["lr"]}
        metrics |= {"batch/micro_batches": sums["micro_batches"]}
    return metrics
