"""Scored dumps: the objective's inputs and results at every token of a batch, one JSON object per rollout.

`learn` hands over the scores, rank 0 gathers and writes them (`dump_scores: true`), the token page reads them.
docs/guides/report.md describes the format. Reading needs neither megatron-core nor SGLang, and executes nothing.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson
import torch
import torch.distributed as dist
from tokenizers.decoders import DecodeStream

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.data.dump_files import dumps_in
from megatron_egrsd.data.samples import Problem, Rollout, is_right
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.objectives.egrsd import confidence
from megatron_egrsd.objectives.interface import Tokens, batch_tokens, weigh
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.objectives.signal import History, advantages
from megatron_egrsd.system.files import atomic

if TYPE_CHECKING:
    from megatron_egrsd.engine.engine import Engine, Scores

_STUDENT = ("student_log_prob", "student_entropy", "rollout_log_prob", "gate", "weight")
_TEACHER = ("teacher_log_prob", "teacher_entropy", "normalized_entropy", "lookahead_entropy")
_COLUMNS = (*_STUDENT, *_TEACHER, "divergence")
_NESTED: dict[str, type] = {"objective": ObjectiveConfig, "problem": Problem, "history": History}
_TYPES: dict[type | tuple[type, ...], tuple[str, ...]] = {
    int: ("step", "vocab_size", "group", "weight_version"),
    (int, float): ("reward", "shaped_reward", "advantage"),
    str: ("prompt", "finish_reason"),
    list: ("response_ids", "pieces"),
}


@dataclass(frozen=True)
class ScoredRollout:
    """One rollout of T response tokens with the objective's values before the update. Arrays are [T] fp32.

    Log-probs and entropies in nats; the four teacher arrays are None if the objective runs no teacher (GRPO).
    `normalized_entropy` is Hhat, `lookahead_entropy` Hhat^CL, `gate` omega, and `entropy_scale` the nats at which Hhat
    reaches 1: the batch's maximum or quantile, this response's maximum, or ln(vocabulary). `gate` is 1 if a user's own
    objective has none. `divergence` is V D, what the divergence from the teacher adds to the loss before the division
    by N; None if the objective asks for none. `reward` is the verifiable one, `shaped_reward` has the length bonus,
    `history` are the running statistics that the advantage was taken from. `pieces` joined are the response.
    """

    step: int
    objective: ObjectiveConfig
    vocab_size: int
    problem: Problem
    prompt: str  # the student's prompt as text
    group: int
    reward: float
    shaped_reward: float
    advantage: float
    history: History
    finish_reason: str  # "stop" | "length"
    weight_version: int
    entropy_scale: float | None
    response_ids: list[int]
    pieces: list[str]
    student_log_prob: np.ndarray
    student_entropy: np.ndarray
    rollout_log_prob: np.ndarray
    gate: np.ndarray
    weight: np.ndarray
    teacher_log_prob: np.ndarray | None = None
    teacher_entropy: np.ndarray | None = None
    normalized_entropy: np.ndarray | None = None
    lookahead_entropy: np.ndarray | None = None
    divergence: np.ndarray | None = None

    @property
    def right(self) -> bool:
        return is_right(self.reward)


def dumped_tokens(scored: list[ScoredRollout]) -> Tokens:
    """Lay the rollouts of a dump end to end, with the scores that it holds."""
    names = [f"{who}_{what}" for who in ("student", "teacher") for what in ("log_prob", "entropy")]
    arrays = {name: [getattr(r, name) for r in scored] for name in names if getattr(scored[0], name) is not None}
    scores = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in arrays.items()}
    return batch_tokens([r.advantage for r in scored], [len(r.response_ids) for r in scored], scores)


def dumps_of(run: Path) -> dict[int, Path]:
    """Return the dumps of a run by step. Raises BadArgument if there is none."""
    found = dumps_in(run / "scores")
    if not found:
        raise BadArgument(f"{run} holds no scored rollouts; train with dump_scores true")
    return found


def gather_scores(engine: "Engine", own: "dict[int, Scores] | None") -> dict[int, np.ndarray] | None:
    """Gather {rollout index: [2, T] log-prob and entropy} on rank 0; None elsewhere, or if `own` is None.

    [3, T] if the samples were scored against a teacher: the divergence from it is the last row. [2 + K, T] with the
    log-probs after K further contexts of a teacher.

    Every rank must call it. `engine.score` leaves a replica's scores on all its ranks, so one gather over the
    data-parallel ranks is enough.
    """
    if own is None:
        return None
    rows = {i: (s.log_prob, s.entropy, s.divergence) for i, s in own.items()}
    part = {i: torch.stack([x for x in r if x is not None]) for i, r in rows.items()}
    further = {i: s.further_log_probs for i, s in own.items()}
    part = {i: x if further[i] is None else torch.cat([x, further[i]]) for i, x in part.items()}
    part = {i: x.float().cpu().numpy() for i, x in part.items()}
    parts = [part]
    if engine.data_parallel > 1:
        parts = [None] * engine.data_parallel if engine.data_parallel_rank == 0 else None
        dist.gather_object(part, parts, group=engine.data_parallel_group, group_dst=0)
    return {i: s for p in parts for i, s in p.items()} if engine.is_first_rank else None


def scored_rollouts(
    rollouts: list[Rollout],
    rewards: list[float],
    advantage: list[float],
    student: dict[int, np.ndarray],
    teacher: dict[int, np.ndarray] | None,
    objective: ObjectiveConfig,
    tokenizer,
    *,
    step: int,
    vocab_size: int,
    history: History,
) -> list[ScoredRollout]:
    """Build the dump of a whole batch, weighted as in `learn`, from the scores of `gather_scores`.

    `rewards` are the shaped ones.
    """
    lengths = [len(r.response_ids) for r in rollouts]
    columns, contexts = {}, {}
    for name, scores in (("student", student), ("teacher", teacher)):
        if scores is not None:
            rows = np.concatenate([scores[i] for i in range(len(rollouts))], 1)
            columns |= {f"{name}_log_prob": rows[0], f"{name}_entropy": rows[1]}
            if name == "student" and len(rows) > 2:
                columns["divergence"] = rows[2]
            if name == "teacher" and load_objective(objective, history).needs_contexts:
                contexts["context_log_prob"] = torch.from_numpy(rows[2:])
    tensors = {name: torch.from_numpy(values) for name, values in columns.items()} | contexts
    weights = batch_weights(batch_tokens(advantage, lengths, tensors), objective, vocab_size, history)
    scales = weights.pop("entropy_scale", None)
    columns |= {name: values.numpy() for name, values in weights.items()}
    columns["rollout_log_prob"] = np.concatenate([np.asarray(r.rollout_log_probs, np.float32) for r in rollouts])
    ends = np.cumsum(lengths)
    return [
        ScoredRollout(
            step=step,
            objective=objective,
            vocab_size=vocab_size,
            problem=r.prompt.problem,
            prompt=tokenizer.decode(r.prompt.student_ids),
            group=r.group,
            reward=r.reward,
            shaped_reward=rewards[i],
            advantage=advantage[i],
            history=history,
            finish_reason=r.finish_reason,
            weight_version=r.weight_version,
            entropy_scale=None if scales is None else scales[ends[i] - lengths[i]].item(),
            response_ids=list(r.response_ids),
            pieces=token_pieces(tokenizer, r.response_ids),
            **{name: column[ends[i] - lengths[i] : ends[i]] for name, column in columns.items()},
        )
        for i, r in enumerate(rollouts)
    ]


def batch_weights(
    tokens: Tokens, objective: ObjectiveConfig, vocab_size: int, history: History | None = None
) -> dict[str, torch.Tensor]:
    """Return weight and gate (1 if the objective has none) of a whole batch, and the entropies behind a gate; [T] each.

    If there is a teacher but another objective than the family's prepares no entropies, they are those of the built-in
    gate. With the tokens' divergence also what it adds to the loss.
    """
    loaded = load_objective(objective, history)
    weight, fields = weigh(loaded, tokens, vocab_size=vocab_size)
    divergence = {}
    if tokens.divergence is not None:
        divergence["divergence"] = loaded.divergence_weight(replace(tokens, fields=fields)) * tokens.divergence
    if tokens.teacher_entropy is not None and "entropy_scale" not in fields:
        built_in = confidence(tokens.teacher_entropy, tokens.cu_seqlens, objective, vocab_size=vocab_size)
        fields = fields | {name: values for name, values in vars(built_in).items() if name != "gate"}
    entropies = ("normalized_entropy", "lookahead_entropy", "entropy_scale")
    gate = fields.get("gate", torch.ones_like(tokens.advantage))
    return {"weight": weight, "gate": gate} | divergence | {name: fields[name] for name in entropies if name in fields}


def with_family_advantages(scored: list[ScoredRollout]) -> list[ScoredRollout]:
    """Return a batch with the family's advantages, from its rewards: an `objective.function` may record others."""
    objective, history = scored[0].objective, scored[0].history
    if not objective.function:
        return scored
    rewards, groups = (torch.tensor([getattr(r, name) for r in scored]) for name in ("shaped_reward", "group"))
    signal = advantages(rewards, groups, objective, history).tolist()
    return [replace(r, advantage=a) for r, a in zip(scored, signal, strict=True)]


def full_colour(weights: Iterable[np.ndarray]) -> float:
    """Return the size of a weight from which on a page shows it in full colour: the 95 % quantile; 1 if all are 0."""
    sizes = abs(np.nan_to_num(np.concatenate(list(weights))))
    return float(np.quantile(sizes[sizes > 0], 0.95)) if sizes.any() else 1.0


def token_pieces(tokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds; joined, the decoded response with its special tokens.

    A character of several byte-level tokens belongs to the last of them, and the others add nothing. Bytes that never
    become a character are U+FFFD, as the tokenizer decodes them.
    """
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    pieces = [stream.step(backend, token) or "" for token in ids]
    whole = backend.decode(ids, skip_special_tokens=False)
    if pieces:
        pieces[-1] += whole[sum(map(len, pieces)) :]
    return pieces


def save_scores(scored: list[ScoredRollout], path: Path) -> None:
    """Write one JSON object per line, atomically. Raises RunError if `path` exists or cannot be written."""
    if path.exists():
        raise RunError(f"{path} exists already; scores are never overwritten")
    with atomic(path) as temporary, temporary.open("wb") as file:
        for rollout in scored:
            row = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
            row |= {name: asdict(row[name]) for name in _NESTED}
            # orjson writes fp32 in the fewest digits that read back exactly, and what is not finite as null.
            file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def load_scores(path: Path, most: int | None = None) -> list[ScoredRollout]:
    """Load a dump of `save_scores`, or its first `most` rollouts.

    Raises BadArgument, naming the line, if one is invalid or of another batch.
    """
    scored = []
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(islice(file, most), 1):
                scored.append(_parse(line, f"{path}, line {number}"))
                # All rollouts share the entropy scale of the batch.
                if _batch(scored[-1]) != _batch(scored[0]):
                    raise BadArgument(f"{path}, line {number} belongs to another batch than line 1")
    except OSError as error:
        raise BadArgument(f"cannot read {path}: {error.strerror}") from None
    if not scored:
        raise BadArgument(f"{path} is empty; it should hold one scored rollout a line (dump_scores: true)")
    return scored


def _batch(rollout: ScoredRollout) -> tuple:
    return rollout.step, rollout.objective, rollout.history, rollout.vocab_size, rollout.teacher_log_prob is None


def _parse(line: bytes, location: str) -> ScoredRollout:
    try:
        row = orjson.loads(line)
        row |= {name: cls(**row[name]) for name, cls in _NESTED.items()}
        row.setdefault("divergence", None)  # older dumps have none
        for name in _COLUMNS:
            if name in _STUDENT or row[name] is not None:
                row[name] = np.array(row[name], np.float32)  # null becomes NaN
        rollout = ScoredRollout(**row)
        _check(rollout)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = error if type(error) is BadArgument else "it is not an object that dump_scores writes"
        raise BadArgument(f"{location} is no scored rollout: {detail}") from None
    return rollout


def _check(rollout: ScoredRollout) -> None:
    for kind, names in _TYPES.items():
        for name in names:
            if not isinstance(getattr(rollout, name), kind):
                raise BadArgument(f"{name} is {getattr(rollout, name)!r}")
    if len({getattr(rollout, name) is None for name in _TEACHER}) > 1:
        raise BadArgument(f"some of {', '.join(_TEACHER)} are missing")
    for name in ("response_ids", "pieces", *_COLUMNS):
        values = getattr(rollout, name)
        if values is not None and np.shape(values) != (len(rollout.response_ids),):
            raise BadArgument(f"{name} does not hold one value a response token")
    if not all(isinstance(text, str) for text in (*rollout.problem.texts, *rollout.pieces)):
        raise BadArgument("the problem's fields and the pieces must be text")
