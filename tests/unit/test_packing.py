"""Packing: every sample once, the budget kept, the ranks in step, rows that predict their targets."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_egrsd.data.packing import Sequence, balance, pack, schedule

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths, st.integers(1, 8))
def test_balance_uses_every_index_once_and_is_even(costs, parts):
    assignment = balance(costs, parts)
    assert sorted(i for part in assignment for i in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in assignment]
    assert max(loads) - min(loads) <= max(costs)


@given(st.lists(lengths, min_size=1, max_size=4), st.integers(1, 200))
def test_schedule_keeps_the_budget_and_the_ranks_in_step(per_rank, budget):
    plan = schedule(per_rank, budget)
    assert len({len(parts) for parts in plan}) == 1
    for own, parts in zip(per_rank, plan, strict=True):
        assert sorted(i for part in parts for i in part) == list(range(len(own)))
        assert all(len(part) <= 1 or sum(own[i] for i in part) <= budget for part in parts)


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
