"""Packing of sequences of unequal length into micro-batches: balanced over the ranks, each sequence exactly once."""

import heapq
import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_egrsd.data.zigzag import zigzag
from megatron_egrsd.rollout.generation import NO_ROUTE


@dataclass(frozen=True)
class Sequence:
    """A prompt and its response as one token sequence.

    `routes` [tokens - 1, layers, k] uint8 are the experts of each token but the last, if they are to be replayed.
    """

    prompt_ids: Seq[int]
    response_ids: Seq[int]
    routes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences: T tokens in all (padding last), R response tokens, B sequences.

    Row `rows[r]` of the hidden states, the row before a response token, predicts `targets[own[r]]`. A batch of only
    padding (B = 0, R = 0) keeps a rank in step that has fewer samples than the others have micro-batches.

    After `split`, `tokens`, `position_ids`, `routes`, `rows` and `own` are those of a context-parallel rank.
    """

    tokens: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, from 0 in every sequence
    cu_seqlens: torch.Tensor  # [B + 1] int32, or [B + 2] if padding forms a last sequence of its own
    rows: torch.Tensor  # [R] int64
    own: torch.Tensor  # [R] int64, indices of the response tokens that the rows predict, in order
    targets: torch.Tensor  # [R] int64
    response_cu_seqlens: torch.Tensor  # [B + 1] int32
    members: tuple[int, ...]  # B indices into the list that was packed
    routes: torch.Tensor | None = None  # [T, layers, k] uint8 experts, NO_ROUTE if none are known

    @property
    def max_seqlen(self) -> int:
        return int(self.cu_seqlens.diff().max())

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def split(self, rank: int, size: int) -> "MicroBatch":
        """Return the part of context-parallel rank `rank`. If size > 1, lengths must be multiples of 2 x size."""
        places = zigzag(self.cu_seqlens, rank, size)
        row = torch.full_like(self.tokens, -1)
        row[places] = torch.arange(places.numel())
        rows = row[self.rows]
        own = (rows >= 0).nonzero()[:, 0]
        return replace(
            self,
            tokens=self.tokens[places],
            position_ids=self.position_ids[places],
            routes=None if self.routes is None else self.routes[places],
            rows=rows[own],
            own=self.own[own],
        )

    def unpack(self, packed: torch.Tensor) -> dict[int, torch.Tensor]:
        """Split [R] into {sample index: [response length]}."""
        lengths = self.response_cu_seqlens.diff().tolist()
        return dict(zip(self.members, packed.split(lengths), strict=True))


def balance(costs: Seq[int], parts: int, loads: Seq[int] | None = None) -> list[list[int]]:
    """Split indices 0..len(costs)-1 into `parts` lists of nearly equal total cost.

    The costliest index goes first, to the part of least cost (Graham 1969: LPT). `loads` are initial costs of the
    parts. Every index appears exactly once; each part is in ascending order. Deterministic.
    """
    assignment = [[] for _ in range(parts)]
    heap = [(load, 0, part) for part, load in enumerate(loads or [0] * parts)]
    heapq.heapify(heap)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, part = heap[0]
        assignment[part].append(i)
        heapq.heapreplace(heap, (load + costs[i], count + 1, part))
    return [sorted(part) for part in assignment]


def balance_passes(scored: Seq[int], trained: Seq[int], parts: int) -> list[list[int]]:
    """Balance two passes over the same samples at once: each pass ends when its slowest rank does.

    First distributes the trained samples by `trained`, then the samples that are only scored (trained cost 0) by
    `scored`, to the part of least scored cost. Balancing the sum of both would leave each pass up to 30 % uneven.
    """
    order = [i for i in range(len(scored)) if trained[i]], [i for i in range(len(scored)) if not trained[i]]
    assignment: list[list[int]] = [[] for _ in range(parts)]
    for members, costs in zip(order, (trained, scored), strict=True):
        loads = [sum(costs[i] for i in part) for part in assignment]
        for part, more in zip(assignment, balance([costs[i] for i in members], parts, loads), strict=True):
            part += [members[i] for i in more]
    return [sorted(part) for part in assignment]


def schedule(lengths_per_rank: Seq[Seq[int]], budget: int, multiple: int = 1) -> list[list[list[int]]]:
    """Return the micro-batches of each rank, as indices into the rank's own samples, the longest first.

    Their number is the same on every rank (the pipeline and the gradient reduction run in step) and a multiple of
    `multiple`. None holds more than `budget` tokens unless it holds a single sample; some are empty if a rank has few
    samples. With the longest first, the n-th of all ranks are alike, and memory peaks at the start.
    """
    least = max(min(-(-sum(lengths) // budget), len(lengths)) for lengths in lengths_per_rank) or 1
    for count in itertools.count(-(-least // multiple) * multiple, multiple):
        plan = [balance(lengths, count) for lengths in lengths_per_rank]
        if all(
            _fits(part, lengths, budget)
            for lengths, parts in zip(lengths_per_rank, plan, strict=True)
            for part in parts
        ):
            break
    return [
        sorted(parts, key=lambda part, own=lengths: -sum(own[i] for i in part))  # type: ignore[misc]
        for lengths, parts in zip(lengths_per_rank, plan, strict=True)
    ]


def _fits(part: list[int], lengths: Seq[int], budget: int) -> bool:
    return len(part) <= 1 or sum(lengths[i] for i in part) <= budget


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def pack(sequences: Seq[Sequence], members: Seq[int], multiple: int = 1, pad_id: int = 0, each: int = 1) -> MicroBatch:
    """Pack `sequences[i]` for i in `members` end to end, padded to a multiple of `multiple` tokens (at least one).

    Every sequence is first padded to a multiple of `each`, which divides `multiple`.
    """
    chosen = [sequences[i] for i in members]
    lengths = [round_up(len(s), each) for s in chosen]
    tokens = [
        t for s, n in zip(chosen, lengths, strict=True)
        for t in (*s.prompt_ids, *s.response_ids, *[pad_id] * (n - len(s)))
    ]  # fmt: skip
    padding = max(multiple, round_up(len(tokens), multiple)) - len(tokens)
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    rows = [
        torch.arange(start + len(s.prompt_ids) - 1, start + len(s) - 1)
        for s, start in zip(chosen, starts, strict=False)
    ]
    response_lengths = torch.tensor([0] + [len(s.response_ids) for s in chosen], dtype=torch.int32)
    spans = lengths + ([padding] if padding else [])
    targets = torch.tensor([t for s in chosen for t in s.response_ids], dtype=torch.int64)
    return MicroBatch(
        tokens=torch.tensor(tokens + [pad_id] * padding, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(n) for n in spans]),
        cu_seqlens=torch.tensor([0, *spans], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        rows=torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64),
        own=torch.arange(targets.numel()),
        targets=targets,
        response_cu_seqlens=response_lengths.cumsum(0, dtype=torch.int32),
        members=tuple(members),
        routes=_routes(chosen, starts, len(tokens) + padding),
    )


def _routes(sequences: Seq[Sequence], starts: Seq[int], tokens: int) -> torch.Tensor | None:
    """Lay the routes of `sequences`, which begin at `starts`, over `tokens`; None if none has any."""
    routed = [(s.routes, start) for s, start in zip(sequences, starts, strict=False) if s.routes is not None]
    if not routed:
        return None
    routes = np.full((tokens, *routed[0][0].shape[1:]), NO_ROUTE, np.uint8)
    for own, start in routed:
        routes[start : start + len(own)] = own
    return torch.from_numpy(routes)
