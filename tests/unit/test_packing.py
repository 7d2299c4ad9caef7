"""Packing: every sample once, the budget kept, the ranks in step, rows that predict their targets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import packing as benchmark
from megatron_egrsd.data.packing import Sequence, balance, balance_passes, pack, round_up, schedule

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


spans_of_tokens = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=6)


def _numbered(spans: list[tuple[int, int]]) -> list[Sequence]:
    """Make sequences of (prompt, response) lengths, with tokens numbered from 1: padding is 0."""
    token = iter(range(1, 1000))
    return [Sequence([next(token) for _ in range(p)], [next(token) for _ in range(r)]) for p, r in spans]


@given(spans_of_tokens, st.sampled_from([1, 4, 8]))
def test_rows_predict_their_targets(spans, multiple):
    sequences = _numbered(spans)
    order = list(range(len(sequences)))[::-1]
    batch = pack(sequences, order, multiple)
    assert batch.tokens.numel() % multiple == 0 and batch.tokens.numel() >= 1
    assert batch.cu_seqlens[-1] == batch.tokens.numel() and batch.cu_seqlens.dtype == torch.int32
    # Tokens are numbered consecutively, so the token after each row must be its target.
    assert torch.equal(batch.tokens[batch.rows] + 1, batch.targets)
    assert batch.own.tolist() == list(range(batch.targets.numel()))
    assert batch.targets.tolist() == [t for i in order for t in sequences[i].response_ids]
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
    unpacked = batch.unpack(batch.targets)
    assert {i: t.tolist() for i, t in unpacked.items()} == {i: list(sequences[i].response_ids) for i in order}


@given(spans_of_tokens, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_context_parallel_ranks_share_every_sequence(spans, size, tensor):
    each = 2 * size if size > 1 else 1
    sequences = _numbered(spans)
    whole = pack(sequences, range(len(sequences)), each * tensor, each=each)
    parts = [whole.split(rank, size) for rank in range(size)]
    total = whole.tokens.numel()
    assert {part.tokens.numel() * size for part in parts} == {total} and total % (each * tensor) == 0
    assert total <= max(each * tensor, round_up(sum(p + r + each - 1 for p, r in spans), each * tensor))
    # Together the parts are the whole: the tokens with their positions, and each response token on one rank.
    pairs = [pair for part in parts for pair in zip(part.tokens.tolist(), part.position_ids.tolist(), strict=True)]
    assert sorted(pairs) == sorted(zip(whole.tokens.tolist(), whole.position_ids.tolist(), strict=True))
    own = torch.cat([part.own for part in parts])
    assert own.sort().values.tolist() == list(range(whole.targets.numel()))
    # A rank's rows predict its own targets, and the scores of all ranks together are the batch's.
    assert all(torch.equal(part.tokens[part.rows] + 1, part.targets[part.own]) for part in parts)
    scores = torch.zeros_like(whole.targets)
    scores[own] = torch.cat([part.tokens[part.rows] for part in parts]) + 1
    unpacked = parts[-1].unpack(scores)
    assert {i: t.tolist() for i, t in unpacked.items()} == {i: list(s.response_ids) for i, s in enumerate(sequences)}
    # Two chunks of each sequence, at equal distance from its ends, in the order of the row.
    for start, end in zip(whole.cu_seqlens[:-1].tolist(), whole.cu_seqlens[1:].tolist(), strict=True):
        for part in parts:
            held = part.position_ids[start // size : end // size].tolist()
            assert held == sorted(held) and len(held) == (end - start) // size
            assert size == 1 or [end - start - 1 - x for x in reversed(held)] == held


def test_context_parallel_chunks():
    """Eight tokens on two ranks: the outer and the inner chunks, as Transformer Engine has them."""
    batch = pack(_numbered([(2, 5), (1, 2)]), [0, 1], 8, each=4)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 8, 9, 10, 0, 0, 0, 0, 0]
    assert [batch.split(rank, 2).tokens.tolist() for rank in (0, 1)] == [
        [1, 2, 7, 0, 8, 0, 0, 0],
        [3, 4, 5, 6, 9, 10, 0, 0],
    ]


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
