"""One step of the method on a batch of rollouts: direction, teacher, gate, update. Algorithm and engine meet here."""

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from megatron_egrsd.config import Config, ObjectiveConfig
from megatron_egrsd.data.packing import MicroBatch, Sequence
from megatron_egrsd.errors import BadUpdate
from megatron_egrsd.objective import advantages, confidence_gate, loss_normalizer, magnitude, policy_loss
from megatron_egrsd.samples import Rollout
from megatron_egrsd.scores import Record

if TYPE_CHECKING:
    from megatron_egrsd.engine.engine import Engine


def learn(engine: "Engine", rollouts: list[Rollout], config: Config, record: Record | None = None) -> dict[str, float]:
    """Train on `rollouts` (all of them, on every rank) and return the step's metrics, equal on every rank.

    With one update per batch the policy that is updated is the one that sampled, so log pi_old is the training pass's
    own log-prob and no separate student pass is run. Rollouts of advantage 0 carry no gradient and are not trained.
    `record` gets the scores of all rollouts before the update, on every rank; it costs a student pass of its own where
    there is one update.
    """
    objective, started = config.objective, time.perf_counter()
    advantage = _advantages(rollouts, objective)
    students = [Sequence(r.prompt.student_ids, r.response_ids) for r in rollouts]
    teachers = [Sequence(r.prompt.teacher_ids, r.response_ids) for r in rollouts]

    minibatches = []
    share = config.rollout.prompts_per_step // config.optimizer.updates_per_batch
    for first in range(0, config.rollout.prompts_per_step, share):
        members = [i for i, r in enumerate(rollouts) if first <= r.group < first + share]
        scored = [len(teachers[i]) for i in members]
        trained = [len(students[i]) if advantage[i] else 0 for i in members]
        minibatches.append([[members[i] for i in part] for part in engine.partition(scored, trained)])
    everyone = [[i for m in minibatches for i in m[rank]] for rank in range(engine.data_parallel)]
    own = everyone[engine.data_parallel_rank]

    fields = {i: {"advantage": advantage[i], "rollout_log_prob": rollouts[i].rollout_log_probs} for i in own}
    teacher_scores = None
    if objective.needs_teacher:
        teacher_scores = scores = engine.score(teachers, everyone, teacher=True)
        gates, normalized = _gates(engine, [scores[i].entropy for i in own], objective)
        for i, gate, h in zip(own, gates, normalized, strict=True):
            fields[i] |= {"teacher_log_prob": scores[i].log_prob, "teacher_entropy": scores[i].entropy}
            fields[i] |= {"gate": gate, "normalized_entropy": h}
    if len(minibatches) > 1 or record:
        scores = engine.score(students, everyone)
        if len(minibatches) > 1:
            for i in own:
                fields[i]["old_log_prob"] = scores[i].log_prob
        if record:
            record(advantage, scores, teacher_scores)
    score_seconds = time.perf_counter() - started

    sums: dict[str, float] = {}
    for minibatch in minibatches:
        members = [i for part in minibatch for i in part]
        num_tokens = sum(len(rollouts[i].response_ids) for i in members)
        for i in minibatch[engine.data_parallel_rank]:
            length = torch.tensor([len(rollouts[i].response_ids)])
            normalizer = loss_normalizer(length, objective, num_tokens=num_tokens, num_sequences=len(members))
            students[i] = replace(students[i], fields=_tensors(fields[i]) | {"normalizer": normalizer})
        trained = [[i for i in part if advantage[i]] for part in minibatch]
        if any(trained):
            try:
                update = engine.train_step(
                    students, trained, lambda lp, h, batch: _loss(lp, h, batch, objective), lambda s: _refuse(s, config)
                )
                update["updates"] = 1
            except BadUpdate as bad:
                update = bad.sums | {f"skipped/{bad.kind}": 1, "skipped": 1}
            sums = {k: sums.get(k, 0.0) + v for k, v in update.items()} | {"lr": update.get("lr", 0.0)}
    return _metrics(rollouts, sums, objective) | {
        "time/score": score_seconds,
        "time/train": time.perf_counter() - started - score_seconds,
    }


def groups_without_signal(rollouts: list[Rollout], objective: ObjectiveConfig) -> list[int]:
    """The groups whose rollouts all have advantage 0 (all right or all wrong, under the group advantage)."""
    signal = {r.group for r, a in zip(rollouts, _advantages(rollouts, objective), strict=True) if a}
    return sorted({r.group for r in rollouts} - signal)


def _advantages(rollouts: list[Rollout], objective: ObjectiveConfig) -> list[float]:
    rewards = torch.tensor([r.reward for r in rollouts])
    return advantages(rewards, torch.tensor([r.group for r in rollouts]), objective).tolist()


def _tensors(fields: dict) -> dict[str, torch.Tensor | float]:
    return {k: torch.tensor(v) if isinstance(v, list) else v for k, v in fields.items()}


def _gates(engine, entropies: list[torch.Tensor], objective: ObjectiveConfig):
    """Gate and normalised entropy of each of this rank's rollouts; the quantile spans all data-parallel ranks."""
    lengths = [e.numel() for e in entropies]
    entropy = torch.cat([*entropies, torch.empty(0, device=engine.device)])
    cu_seqlens = torch.tensor([0, *lengths], device=engine.device).cumsum(0, dtype=torch.int32)
    mask = torch.ones_like(entropy, dtype=torch.bool)
    gate, normalized = confidence_gate(
        entropy, cu_seqlens, mask, objective, vocab_size=engine.arch.vocab_size, group=engine.data_parallel_group
    )
    return gate.split(lengths), normalized.split(lengths)


def _loss(log_prob: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch, objective: ObjectiveConfig):
    """The policy loss of one micro-batch, all tensors [R], and the sums that become metrics."""
    f = batch.fields
    old = f.get("old_log_prob", log_prob.detach())
    rollout = f["rollout_log_prob"]
    mask = torch.ones_like(batch.targets, dtype=torch.bool)
    weight = f["advantage"]
    sums = {}
    if objective.needs_teacher:
        log_ratio = f["teacher_log_prob"] - old
        weight = weight * magnitude(weight, f["teacher_log_prob"], old, objective) * f["gate"]
        outside = (torch.exp(torch.sign(f["advantage"]) * log_ratio) - 1).abs() > objective.ratio_clip
        sums = {
            "teacher_entropy": f["teacher_entropy"].sum(),
            "gate": f["gate"].sum(),
            "gated": (f["gate"] < 1 - objective.attenuation / 2).sum(),
            "log_ratio": log_ratio.sum(),
            "ratio_clipped": outside.sum(),
        }
    result = policy_loss(log_prob, old, weight, mask, f["normalizer"], objective, rollout_log_prob=rollout)
    sums |= {
        "loss": result.loss.detach(),
        "tokens": result.tokens,
        "clipped": result.clipped,
        "entropy": entropy.detach().sum(),
        "log_prob_difference": (old - rollout).abs().sum(),
        "abs_weight": weight.abs().sum(),
    }
    return result.loss, sums


def _refuse(sums: dict[str, float], config: Config) -> str:
    """Why an update with these sums must not be made; empty where nothing speaks against it."""
    difference = sums["log_prob_difference"]
    if not math.isfinite(difference):
        return "log_prob"
    if not math.isfinite(sums["loss"]):
        return "loss"
    return "disagreement" if difference > config.max_log_prob_difference * sums["tokens"] else ""


def rollout_metrics(rollouts: list[Rollout], objective: ObjectiveConfig) -> dict[str, float]:
    """What the rollouts alone say."""
    lengths, n = [len(r.response_ids) for r in rollouts], len(rollouts)
    return {
        "reward/mean": sum(r.reward for r in rollouts) / n,
        "accuracy": sum(r.reward > 0.5 for r in rollouts) / n,
        "response/length": sum(lengths) / n,
        "response/truncated": sum(r.finish_reason == "length" for r in rollouts) / n,
        "batch/tokens": float(sum(lengths)),
        "batch/degenerate_share": sum(a == 0 for a in _advantages(rollouts, objective)) / n,
    }


def _metrics(rollouts: list[Rollout], sums: dict[str, float], objective: ObjectiveConfig) -> dict[str, float]:
    """Sums over trained tokens into means, with what the rollouts alone say."""
    metrics = rollout_metrics(rollouts, objective) | {"optimizer/updates": float(sums.get("updates", 0))}
    tokens, updates = max(sums.get("tokens", 0.0), 1.0), max(sums.get("updates", 0), 1)
    if "tokens" not in sums:
        return metrics
    names = {
        "entropy": "student/entropy",
        "teacher_entropy": "teacher/entropy",
        "gate": "gate/mean",
        "gated": "gate/closed_share",
        "log_ratio": "weight/log_ratio",
        "ratio_clipped": "weight/clip_share",
        "abs_weight": "weight/abs_mean",
        "clipped": "loss/clip_share",
        "log_prob_difference": "sync/log_prob_difference",
    }
    metrics |= {names[k]: v / tokens for k, v in sums.items() if k in names}
    metrics |= {k: v for k, v in sums.items() if k.startswith("skipped/")}
    metrics |= {"loss/policy": sums["loss"] / updates, "optimizer/skipped": float(sums.get("skipped", 0))}
    if "grad_norm" in sums:
        metrics |= {"optimizer/grad_norm": sums["grad_norm"] / updates, "optimizer/lr": sums["lr"]}
        metrics |= {"batch/micro_batches": sums["micro_batches"]}
    return metrics
