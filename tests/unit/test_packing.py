"""Packing: every sample once, the budget kept, the ranks in step, rows that predict their targets."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd.data.packing import Sequence, balance, balance_passes, pack, schedule

DATA = Path(__file__).parents[1] / "data"
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths, st.integers(1, 8))
def test_balance_uses_every_index_once_and_is_even(costs, parts):
    assignment = balance(costs, parts)
    assert sorted(i for part in assignment for i in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in assignment]
    assert max(loads) - min(loads) <= max(costs)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=40), st.integers(1, 8))
def test_both_passes_use_every_index_once_and_are_even(costs, parts):
    scored, trained = [s for s, _ in costs], [t for _, t in costs]
    assignment = balance_passes(scored, trained, parts)
    assert sorted(i for part in assignment for i in part) == list(range(len(costs)))
    loads = [sum(trained[i] for i in part) for part in assignment]
    assert max(loads) - min(loads) <= max(trained, default=0)
    if not any(trained):
        assert assignment == balance(scored, parts)


@given(st.lists(lengths, min_size=1, max_size=4), st.integers(1, 200))
def test_schedule_keeps_the_budget_and_the_ranks_in_step(per_rank, budget):
    plan = schedule(per_rank, budget)
    assert len({len(parts) for parts in plan}) == 1
    for own, parts in zip(per_rank, plan, strict=True):
        assert sorted(i for part in parts for i in part) == list(range(len(own)))
        loads = [sum(own[i] for i in part) for part in parts]
        assert all(len(part) <= 1 or load <= budget for part, load in zip(parts, loads, strict=True))
        assert loads == sorted(loads, reverse=True)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=6), st.sampled_from([1, 4, 8]))
def test_rows_predict_their_targets(spans, multiple):
    token = iter(range(1, 1000))
    sequences = [
        Sequence(
            [next(token) for _ in range(p)], [next(token) for _ in range(r)], {"a": float(p), "b": torch.arange(r)}
        )
        for p, r in spans
    ]
    order = list(range(len(sequences)))[::-1]
    batch = pack(sequences, order, multiple)
    assert batch.tokens.numel() % multiple == 0 and batch.tokens.numel() >= 1
    assert batch.cu_seqlens[-1] == batch.tokens.numel() and batch.cu_seqlens.dtype == torch.int32
    # Tokens are numbered consecutively, so the token after each row must be its target.
    assert torch.equal(batch.tokens[batch.rows] + 1, batch.targets)
    assert batch.targets.tolist() == [t for i in order for t in sequences[i].response_ids]
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
    unpacked = batch.unpack(batch.targets)
    assert {i: t.tolist() for i, t in unpacked.items()} == {i: list(sequences[i].response_ids) for i in order}
    if sequences:
        assert batch.fields["b"].tolist() == [b for i in order for b in range(len(sequences[i].response_ids))]


def test_batch_of_padding_alone():
    batch = pack([], [], 4)
    assert batch.tokens.tolist() == [0] * 4 and batch.targets.numel() == 0 and batch.cu_seqlens.tolist() == [0, 4]


def _characters(file: str, key: str) -> list[int]:
    return [len(json.loads(line)[key]) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


# Tokens of a response. The two sets of solutions lend the shape (3 characters a token; a model reasons longer than the
# AIME solutions are); the third is a reasoning model's long tail, cut at 16k.
RESPONSES = {
    "GSM8K": lambda rng, n: [rng.choice(GSM8K) // 3 + rng.randint(1, 30) for _ in range(n)],
    "AIME": lambda rng, n: [rng.choice(AIME) * rng.randint(1, 5) // 3 + rng.randint(1, 300) for _ in range(n)],
    "long-tailed": lambda rng, n: [min(16384, 1 + round(rng.lognormvariate(math.log(3000), 0.9))) for _ in range(n)],
}
GSM8K, AIME = _characters("gsm8k_test.jsonl", "answer"), _characters("aime24.jsonl", "solution")


@pytest.mark.parametrize("name", RESPONSES)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.sampled_from([1, 2, 8, 32]),
    samples=st.sampled_from([32, 64, 128]),
    budget=st.sampled_from([17408, 34816]),
    degenerate=st.sampled_from([0.0, 0.3, 0.6]),
)
@settings(max_examples=40)
def test_real_lengths_waste_less_than_a_twentieth(name, seed, ranks, samples, budget, degenerate):
    """A step of groups of 8: the teacher scores all samples, those with an advantage are trained.

    A pass takes ranks x micro-batches x the longest micro-batch of each turn, whatever less a rank has to do meanwhile.
    """
    rng = random.Random(seed)
    responses = RESPONSES[name](rng, ranks * samples)
    signal = [rng.random() >= degenerate for _ in range(ranks * samples // 8)]
    student = [100 + n for n in responses]
    teacher = [400 + n for n in responses]
    trained = [n if signal[i // 8] else 0 for i, n in enumerate(student)]
    partition = balance_passes(teacher, trained, ranks)
    for costs in (teacher, trained):
        per_rank = [[costs[i] for i in part if costs[i]] for part in partition]
        totals = [sum(own) for own in per_rank]
        if sum(map(len, per_rank)) < 32 * ranks:
            continue  # with few samples a rank, a single long one is more than a rank's share
        assert max(totals) <= 1.05 * sum(totals) / ranks
        plan = schedule(per_rank, budget)
        loads = [[sum(own[i] for i in part) for part in parts] for own, parts in zip(per_rank, plan, strict=True)]
        computed = [[-(-load // 8) * 8 for load in rank] for rank in loads]  # padded for sequence parallelism, TP 8
        time = sum(max(turn) for turn in zip(*computed, strict=True))
        assert sum(totals) > 0.95 * ranks * time
        fewest = -(-max(totals) // budget)
        assert len(plan[0]) <= max(fewest + 1, 1.1 * fewest)
