"""One step of the method on a batch of rollouts. Algorithm and engine meet here.

`learn` divides the batch into updates, scores it, prepares the columns of the loss, and updates the weights.
"""

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_egrsd.config import Config, ObjectiveConfig
from megatron_egrsd.data.packing import MicroBatch, Sequence
from megatron_egrsd.data.samples import Rollout
from megatron_egrsd.engine.engine import Engine, Scores
from megatron_egrsd.engine.heads import TeacherStates
from megatron_egrsd.engine.update import TokenSums, Update
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.operations import forward_flops, head_flops, needed_training_flops
from megatron_egrsd.objectives.interface import Objective, Tokens, batch_tokens, is_trained, rollout_advantages
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.objectives.loss import divergence_loss, importance_weight, loss_normalizer, policy_loss
from megatron_egrsd.objectives.signal import History

# (shaped reward and signal of every rollout, this data-parallel rank's student scores, its teacher scores or None)
Record = Callable[[list[float], list[float], dict[int, Scores], dict[int, Scores] | None], None]


def learn(
    engine: Engine,
    rollouts: list[Rollout],
    config: Config,
    record: Record | None = None,
    history: History | None = None,
) -> tuple[dict[str, float], History]:
    """Train on `rollouts` (all of them, on every rank); return the step's metrics and the history after it.

    Both are equal on every rank. A skipped update counts in the history as well: its rewards are real.

    Args:
        record: Gets the scores of all rollouts before the update, on every rank. It costs a student pass of its own if
            there is one update.
        history: The objective's history of earlier steps; default: none, as before the first step.
    """
    started, history = time.perf_counter(), history or History()
    objective = load_objective(config.objective, history)
    batch = _divide(engine, rollouts, objective, config)
    scores = _score(engine, batch, objective, with_student=record is not None)
    if record:
        record(batch.shaped_rewards, batch.advantage, scores.student, scores.teacher)
    columns = _prepare(engine, batch, objective, scores)
    notes = objective.remember(columns.tokens, group=engine.data_parallel_group)
    scored = time.perf_counter()
    updates = _update(engine, batch, objective, columns, scores.states, config.log_prob_limit)
    engine.refresh_teacher(history.steps + 1)
    metrics = rollout_metrics(rollouts, batch.shaped_rewards, batch.advantage) | _update_metrics(updates)
    metrics |= {"reward/running_mean": history.mean, "reward/running_std": history.std}
    if config.rollout.routing_replay:
        metrics["sync/routing_changed"] = engine.passes.routing.share_changed(engine.device)
    metrics |= {f"history/{name}": value for name, value in notes.items()}
    metrics["perf/model_flops"] = _model_flops(engine, batch, objective, scores)
    metrics |= {"time/score": scored - started, "time/train": time.perf_counter() - scored}
    return metrics, history.after(batch.shaped_rewards, notes)


@dataclass(frozen=True)
class _Batch:
    """The rollouts of a step with their signals, divided into updates and over the data-parallel ranks.

    Rollouts without a gradient are scored, for the statistics of the objective, but not trained.
    """

    rollouts: list[Rollout]
    shaped_rewards: list[float]
    advantage: list[float]
    trained: list[bool]
    students: list[Sequence]
    teachers: list[Sequence]
    further_teachers: list[Sequence]  # the responses after further contexts, of all rollouts
    further_of: list[list[int]]  # those of each rollout
    updates: list[list[list[int]]]  # of each update, the rollouts of every data-parallel rank

    @property
    def partition(self) -> list[list[int]]:
        """The rollouts of every data-parallel rank, those of the first update first."""
        return [list(itertools.chain(*parts)) for parts in zip(*self.updates, strict=True)]

    @property
    def further_partition(self) -> list[list[int]]:
        """The further teachers of every data-parallel rank: those of its rollouts."""
        return [[k for i in part for k in self.further_of[i]] for part in self.partition]

    def length(self, i: int) -> int:
        """Return the number of response tokens of rollout `i`."""
        return len(self.rollouts[i].response_ids)

    def scores_student(self, objective: Objective) -> bool:
        """Return whether training needs the student's scores from a pass before the first update.

        With one update the policy that is updated is the one that sampled, so log pi_old is the training pass's own
        log-prob.
        """
        return len(self.updates) > 1 or objective.needs_student


def _divide(engine: Engine, rollouts: list[Rollout], objective: Objective, config: Config) -> _Batch:
    """Give each rollout its signal, and divide the prompts equally among the updates."""
    shaped, advantage = rollout_advantages(rollouts, objective, config.rollout.max_response_tokens)
    trained = [is_trained(a, objective) for a in advantage]
    students = [_student(r, engine.arch, config.rollout.routing_replay) for r in rollouts]
    teachers, further_teachers, further_of = _teachers(rollouts, objective)
    updates = []
    prompts = config.rollout.prompts_per_step // config.optimizer.updates_per_batch
    for first in range(0, config.rollout.prompts_per_step, prompts):
        members = [i for i, r in enumerate(rollouts) if first <= r.group < first + prompts]
        scored_tokens = [len(teachers[i]) + sum(len(further_teachers[k]) for k in further_of[i]) for i in members]
        trained_tokens = [len(students[i]) if trained[i] else 0 for i in members]
        updates.append([[members[i] for i in part] for part in engine.partition(scored_tokens, trained_tokens)])
    return _Batch(rollouts, shaped, advantage, trained, students, teachers, further_teachers, further_of, updates)


def _student(rollout: Rollout, arch: Architecture, replayed: bool) -> Sequence:
    """Return the response after the student's prompt, with the experts to send it through if they are `replayed`."""
    routes = None
    if replayed:
        shape = rollout.routed_tokens, arch.num_layers, arch.experts_per_token
        routes = np.frombuffer(rollout.routes, np.uint8).reshape(shape)
    return Sequence(rollout.prompt.student_ids, rollout.response_ids, routes)


def _teachers(rollouts: list[Rollout], objective: Objective) -> tuple[list[Sequence], list[Sequence], list[list[int]]]:
    """List what the teacher scores: each response after its first context, and after others if `objective` asks."""
    first, further, of = [], [], []
    for r in rollouts:
        prompts = r.teacher_prompts
        more = prompts[1:] if objective.needs_contexts else []
        first.append(Sequence(prompts[0], r.response_ids))
        of.append(list(range(len(further), len(further) + len(more))))
        further += [Sequence(ids, r.response_ids) for ids in more]
    return first, further, of


@dataclass(frozen=True)
class BatchScores:
    """Scores of this data-parallel rank's rollouts before the first update, each None if that model was not run."""

    teacher: dict[int, Scores] | None
    student: dict[int, Scores] | None
    reference: dict[int, Scores] | None = None
    states: TeacherStates | None = None  # of the teacher, for an objective with a divergence from it


def _score(engine: Engine, batch: _Batch, objective: Objective, *, with_student: bool) -> BatchScores:
    """Score the batch by teacher, student and reference, each if training needs it; the student if asked for, too."""
    partition, students = batch.partition, batch.students
    scored = students if with_student or batch.scores_student(objective) else []
    if objective.divergence is not None:
        teacher, states = engine.hold_teacher(batch.teachers, students, partition, objective.divergence)
        student = engine.score(scored, partition, teacher=states) if scored else None
        scores = BatchScores(teacher, student, states=states)
    else:
        teachers = batch.teachers if objective.needs_teacher else []
        scores = score_teacher_and_student(engine, teachers, scored, partition)
    if objective.needs_contexts:
        assert scores.teacher is not None
        scores = replace(scores, teacher=_with_further_log_probs(engine, batch, scores.teacher))
    if objective.config.kl_coef:
        scores = replace(scores, reference=engine.score(students, partition, "reference"))
    return scores


def _with_further_log_probs(engine: Engine, batch: _Batch, scores: dict[int, Scores]) -> dict[int, Scores]:
    """Add to the teacher's `scores` its log-probs after the further contexts, by rollout."""
    found = engine.score(batch.further_teachers, batch.further_partition, "teacher") if batch.further_teachers else {}
    most = max(map(len, batch.further_of))
    result = {}
    for i, first in scores.items():
        rows = torch.full((most, batch.length(i)), torch.nan, device=engine.device)
        for row, k in zip(rows, batch.further_of[i], strict=False):
            row.copy_(found[k].log_prob)
        result[i] = replace(first, further_log_probs=rows)
    return result


def score_teacher_and_student(
    engine: Engine, teachers: list[Sequence], students: list[Sequence], partition: list[list[int]]
) -> BatchScores:
    """Score both, in one pass if both have the same weights; None for what is empty.

    One pass fills and drains the pipeline once instead of twice.
    """
    if not (teachers and students and engine.teacher.weights == "live"):
        return BatchScores(
            engine.score(teachers, partition, "teacher") if teachers else None,
            engine.score(students, partition) if students else None,
        )
    n = len(teachers)
    both = engine.score(teachers + students, [part + [n + i for i in part] for part in partition])
    return BatchScores({i: s for i, s in both.items() if i < n}, {i - n: s for i, s in both.items() if i >= n})


def _model_flops(engine: Engine, batch: _Batch, objective: Objective, scores: BatchScores) -> float:
    """Return the operations that training on the batch needs, of all ranks.

    Neither recomputation nor a student pass for the record alone is counted.
    """
    arch, adapter = engine.arch, engine.adapter
    of_teacher = None if engine.teacher.weights == "frozen" else adapter
    passes = (
        (scores.teacher, batch.teachers + batch.further_teachers, of_teacher),
        (scores.student if batch.scores_student(objective) else None, batch.students, adapter),
        (scores.reference, batch.students, None),
    )
    flops = 0.0
    for found, sequences, spec in passes:
        if found is not None:
            rows = sum(len(s.response_ids) for s in sequences)
            flops += forward_flops(arch, [len(s) for s in sequences], spec) + head_flops(arch, rows)
    trained = list(itertools.compress(batch.students, batch.trained))
    rows = sum(len(s.response_ids) for s in trained)
    return flops + needed_training_flops(arch, [len(s) for s in trained], rows, adapter)


@dataclass(frozen=True)
class _Columns:
    """Inputs of the loss besides the training pass's own scores: rollouts end to end, tensors [T] fp32."""

    tokens: Tokens  # with what the objective prepared; without student scores if the training pass gives them
    rollout_log_prob: torch.Tensor | None  # None if nothing was sampled: the policy's own then
    normalizer: torch.Tensor
    reference_log_prob: torch.Tensor | None  # None without a KL penalty

    def select(self, spans: list[slice], cu_seqlens: torch.Tensor) -> "_Columns":
        """Return the tokens of `spans`, which are the rollouts that `cu_seqlens` bounds, end to end."""

        def pick(column: torch.Tensor | None) -> torch.Tensor | None:
            return None if column is None else torch.cat([column[..., span] for span in spans], -1)

        own = vars(self.tokens)
        columns = {name: pick(column) for name, column in own.items() if name not in ("cu_seqlens", "fields")}
        fields = {name: pick(column) for name, column in self.tokens.fields.items()}
        tokens = Tokens(cu_seqlens, fields=fields, **columns)
        return _Columns(tokens, *map(pick, (self.rollout_log_prob, self.normalizer, self.reference_log_prob)))


@torch.no_grad()
def _prepare(engine: Engine, batch: _Batch, objective: Objective, scores: BatchScores) -> _Columns:
    """Lay this rank's rollouts end to end, with what the objective makes of the whole batch."""
    own = batch.partition[engine.data_parallel_rank]
    found = {"teacher": scores.teacher, "student": scores.student if batch.scores_student(objective) else None}
    columns = {}
    for name, by_rollout in found.items():
        if by_rollout is not None:
            columns[f"{name}_log_prob"] = torch.cat([by_rollout[i].log_prob for i in own])
            columns[f"{name}_entropy"] = torch.cat([by_rollout[i].entropy for i in own])
    if scores.teacher is not None and objective.needs_contexts:
        columns["context_log_prob"] = torch.cat([scores.teacher[i].further_log_probs for i in own], -1)
    if found["student"] is not None and objective.divergence is not None:
        columns["divergence"] = torch.cat([found["student"][i].divergence for i in own])
    tokens = batch_tokens([batch.advantage[i] for i in own], [batch.length(i) for i in own], columns, engine.device)
    fields = objective.prepare(tokens, vocab_size=engine.arch.vocab_size, group=engine.data_parallel_group)
    sampled = [x for i in own for x in batch.rollouts[i].rollout_log_probs]
    reference = scores.reference
    return _Columns(
        tokens=replace(tokens, fields={name: values.float() for name, values in fields.items()}),
        rollout_log_prob=torch.tensor(sampled, device=engine.device) if objective.needs_rollouts else None,
        normalizer=_normalizer(batch, engine.data_parallel_rank, objective.config).to(engine.device),
        reference_log_prob=torch.cat([reference[i].log_prob for i in own]) if reference else None,
    )


def _normalizer(batch: _Batch, rank: int, config: ObjectiveConfig) -> torch.Tensor:
    """Return the divisor of each token's term of the loss, [T] fp32 of `rank`'s rollouts; each update has its own."""
    parts = []
    for update in batch.updates:
        lengths = [batch.length(i) for part in update for i in part]
        own = torch.tensor([batch.length(i) for i in update[rank]])
        parts.append(loss_normalizer(own, config, num_tokens=sum(lengths), num_sequences=len(lengths)))
    return torch.cat(parts)


def _update(
    engine: Engine,
    batch: _Batch,
    objective: Objective,
    columns: _Columns,
    states: TeacherStates | None,
    limit: float,
) -> list[Update]:
    """Take one optimizer step for each share of the batch in which a rollout has a gradient."""
    own = batch.partition[engine.data_parallel_rank]
    ends = itertools.accumulate(batch.length(i) for i in own)
    spans = {i: slice(end - batch.length(i), end) for i, end in zip(own, ends, strict=True)}

    def loss(*results: torch.Tensor | MicroBatch):
        *scores, micro_batch = results
        selected = columns.select([spans[i] for i in micro_batch.members], micro_batch.response_cu_seqlens)
        return _loss(Scores(*scores), selected, objective)

    reason_to_skip = functools.partial(_reason_to_skip, limit=limit)
    trained = ([[i for i in part if batch.trained[i]] for part in update] for update in batch.updates)
    step = functools.partial(
        engine.train_step,
        batch.students,
        loss=loss,
        reason_to_skip=reason_to_skip,
        teacher=states,
        log_prob_grad=objective.has_policy_loss or bool(objective.config.kl_coef),
    )
    return [step(parts) for parts in trained if any(parts)]


def _loss(scores: Scores, columns: _Columns, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of one micro-batch of R tokens, and sums over them by the name of the metric that is their mean.

    `scores` [R] are those of the training pass. Without scores of its own, the student before the update is the policy
    that is being trained.
    """
    tokens, log_prob, entropy = columns.tokens, scores.log_prob, scores.entropy
    with torch.no_grad():
        if tokens.student_log_prob is None:
            now = {"student_log_prob": log_prob, "student_entropy": entropy, "divergence": scores.divergence}
            tokens = replace(tokens, **{name: x.detach() for name, x in now.items() if x is not None})
        weight = objective.weight(tokens)
        sums = {name: values.sum() for name, values in objective.metrics(tokens).items()}
    old, reference = tokens.student_log_prob, columns.reference_log_prob
    rollout = old if columns.rollout_log_prob is None else columns.rollout_log_prob
    others = {"rollout_log_prob": rollout, "reference_log_prob": reference}
    result = policy_loss(log_prob, old, weight, columns.normalizer, objective.config, **others)
    loss = result.loss
    if scores.divergence is not None:
        importance = importance_weight(old, rollout, objective.config)
        pull = objective.divergence_weight(tokens)
        loss = loss + divergence_loss(scores.divergence, pull, importance, columns.normalizer)
        sums["loss/divergence"] = scores.divergence.detach().sum()
    if tokens.teacher_log_prob is not None:
        sums["teacher/entropy"] = tokens.teacher_entropy.sum()
        sums["weight/log_ratio"] = (tokens.teacher_log_prob - old).sum()
    sums |= {
        "student/entropy": entropy.detach().sum(),
        "loss/clip_share": result.clipped,
        "sync/log_prob_difference": (old - rollout).abs().sum(),
        "weight/abs_mean": weight.abs().sum(),
        "loss/importance": result.importance,
        "loss/kl": result.kl,
    }
    return loss, sums


def _reason_to_skip(sums: TokenSums, limit: float) -> str:
    """Return the reason to skip an update with these sums, or "" if it may be applied; `limit` in nats a token."""
    difference = sums.values["sync/log_prob_difference"]
    if not math.isfinite(difference):
        return "log_prob"
    if not math.isfinite(sums.loss):
        return "loss"
    return "disagreement" if difference > limit * sums.tokens else ""


def rollout_metrics(rollouts: list[Rollout], shaped_rewards: list[float], advantage: list[float]) -> dict[str, float]:
    """Return the metrics that need no engine."""
    lengths, n = [len(r.response_ids) for r in rollouts], len(rollouts)
    return {
        "reward/mean": sum(r.reward for r in rollouts) / n,
        "reward/shaped": sum(shaped_rewards) / n,
        "reward/failed": float(sum(bool(r.reward_error) for r in rollouts)),
        "accuracy": sum(r.right for r in rollouts) / n,
        "response/length": sum(lengths) / n,
        "response/truncated": sum(r.finish_reason == "length" for r in rollouts) / n,
        "batch/tokens": float(sum(lengths)),
        "batch/degenerate_share": sum(a == 0 for a in advantage) / n,
    }


def _update_metrics(updates: list[Update]) -> dict[str, float]:
    """Return means over the trained tokens of all updates; loss, gradient and counts of the applied updates."""
    applied = [update for update in updates if not update.skipped]
    metrics = {"optimizer/updates": float(len(applied))}
    if not updates:
        return metrics
    sums = sum((update.sums for update in updates), TokenSums())
    metrics |= {name: value / max(sums.tokens, 1.0) for name, value in sums.values.items()}
    skipped = Counter(update.skipped for update in updates if update.skipped)
    metrics |= {f"skipped/{reason}": float(count) for reason, count in skipped.items()}
    metrics["optimizer/skipped"] = float(skipped.total())
    if applied:
        metrics["loss/policy"] = sum(update.sums.loss for update in applied) / len(applied)
        metrics["optimizer/grad_norm"] = sum(update.grad_norm for update in applied) / len(applied)
        metrics["optimizer/lr"] = applied[-1].lr
        metrics["batch/micro_batches"] = float(sum(update.micro_batches for update in applied))
    return metrics
