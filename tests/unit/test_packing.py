"""Packing: every sample once, the budget kept, the ranks in step, rows that predict their targets."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd.data.packing import Sequence, balance, balance_passes, pack, schedule

spec = importlib.util.spec_from_file_location(
    "benchmark_packing", Path(__file__).parents[2] / "tools/benchmark_packing.py"
)
benchmark = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmark  # dataclasses look their module up
spec.loader.exec_module(benchmark)

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


@given(st.lists(lengths, min_size=1, max_size=4), st.integers(1, 200), st.integers(1, 4))
def test_schedule_keeps_the_budget_and_the_ranks_in_step(per_rank, budget, multiple):
    plan = schedule(per_rank, budget, multiple)
    assert len({len(parts) for parts in plan}) == 1
    assert len(plan[0]) % multiple == 0
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


@pytest.mark.parametrize("name", benchmark.RESPONSES)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.sampled_from([1, 2, 8, 32]),
    samples=st.sampled_from([32, 64, 128]),
    budget=st.sampled_from([17408, 34816]),
    degenerate=st.sampled_from([0.0, 0.3, 0.6]),
)
@settings(max_examples=40)
def test_real_lengths_waste_less_than_a_twentieth(name, seed, ranks, samples, budget, degenerate):
    for one in benchmark.step_waste(name, ranks, samples, degenerate, seed, budget):
        if one.samples < 32:
            continue  # with few samples a rank, a single long one is more than a rank's share
        assert one.imbalance <= 0.05
        assert one.waiting < 0.05
        assert one.micro_batches <= max(one.fewest + 1, 1.1 * one.fewest)
