"""Read what the analyses take: the columns of scored dumps, as arrays over all response tokens."""

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.mechanism.tokens import token_kinds, token_roles
from megatron_egrsd.report.family import family
from megatron_egrsd.report.scored_dump import ScoredRollout, batch_weights, dumped_tokens, with_family_advantages

# Of a response: step, problem, its tokens, and its number among equal ones. The dumps of several contexts of a teacher
# may hold different responses.
Key = tuple[int, str, tuple[int, ...], int]


@dataclass(frozen=True)
class Columns:
    """The tokens of some responses, end to end; arrays are [T] unless they say otherwise."""

    keys: list[Key]  # of the responses
    lengths: np.ndarray  # tokens of each response
    right: np.ndarray  # [responses] bool: rewarded with more than 0.5
    problem: np.ndarray  # number of the token's problem
    position: np.ndarray  # in its response: 0 the first token, 1 the last
    direction: np.ndarray  # D, the sign of the advantage
    entropy: np.ndarray  # H of the teacher, nats
    delta: np.ndarray  # log p_T - log p_S, nats
    normalized: np.ndarray  # Hhat
    gate: np.ndarray  # omega of EGRSD
    looking_gate: np.ndarray  # omega of CL-EGRSD
    kind: np.ndarray  # index into tokens.KINDS
    role: np.ndarray  # index into tokens.ROLES


def places(keys: list[Key], chosen: list[Key]) -> np.ndarray:
    """Return the [T] places of the tokens of the responses `chosen` among those of `keys`, in the order of `chosen`."""
    ends = np.cumsum([len(key[2]) for key in keys])
    spans = {key: np.arange(end - len(key[2]), end) for key, end in zip(keys, ends, strict=True)}
    return np.concatenate([spans[key] for key in chosen])


def columns(dumps: list[list[ScoredRollout]]) -> Columns:
    """Lay scored batches end to end, each gated with its own entropy scale."""
    dumps = [with_family_advantages(batch) for batch in dumps]
    rollouts = [rollout for batch in dumps for rollout in batch]
    lengths = np.array([len(r.response_ids) for r in rollouts])
    tokens = [dumped_tokens(batch) for batch in dumps]
    objective = family(dumps[0][0].objective)["cl_egrsd"]
    weighted = []
    for batch, own in zip(dumps, tokens, strict=True):
        looking = batch_weights(own, objective, batch[0].vocab_size)
        plain = batch_weights(own, replace(objective, lookahead=0), batch[0].vocab_size)
        weighted.append((plain["normalized_entropy"], plain["gate"], looking["gate"]))
    normalized, gate, looking_gate = (np.concatenate(part) for part in zip(*weighted, strict=True))
    names = [r.problem.id for r in rollouts]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    ended = [r.finish_reason == "stop" for r in rollouts]

    def joined(parts) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in parts])

    return Columns(
        keys=_keys(rollouts),
        lengths=lengths,
        right=np.array([r.right for r in rollouts]),
        problem=np.repeat([numbers[name] for name in names], lengths),
        position=joined(np.arange(n) / max(n - 1, 1) for n in lengths),
        direction=joined(np.sign(own.advantage) for own in tokens),
        entropy=joined(r.teacher_entropy for r in rollouts).astype(float),
        delta=joined(r.teacher_log_prob.astype(float) - r.student_log_prob for r in rollouts),
        normalized=normalized.astype(float),
        gate=gate.astype(float),
        looking_gate=looking_gate.astype(float),
        kind=joined(token_kinds(r.pieces, e) for r, e in zip(rollouts, ended, strict=True)),
        role=joined(token_roles(r.pieces, e) for r, e in zip(rollouts, ended, strict=True)),
    )


def _keys(rollouts: list[ScoredRollout]) -> list[Key]:
    seen: dict[tuple, int] = {}
    keys = []
    for rollout in rollouts:
        name = rollout.step, rollout.problem.id, tuple(rollout.response_ids)
        seen[name] = seen.get(name, 0) + 1
        keys.append((*name, seen[name]))
    return keys
