"""The vocab-parallel functions on real gloo groups: TP 2, 4 and 8 against one shard, and the collectives counted."""

import collections
import io

import pytest
import torch

from tests.ranks import run_ranks

VOCAB, COLUMNS, TOKENS, WIDTH = 1003, 1024, (3, 4), 16  # 21 padded columns; at TP 8 they are part of the last shard


def _case(dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, WIDTH, generator=g).to(dtype)
    weight = torch.randn(COLUMNS, WIDTH, generator=g).to(dtype)
    weight[VOCAB:] = 3.0  # padded rows that would change the results if they were not ignored
    target = torch.randint(0, VOCAB, TOKENS, generator=g)
    target[1, 2] = -100
    return hidden, weight, target, *torch.randn(2, *TOKENS, generator=g)


def _count_collectives():
    """Return a counter of calls to torch.distributed's collectives from now on."""
    import torch.distributed as dist

    counts = collections.Counter()

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    from megatron_egrsd.vocab_parallel import collectives

    for name in ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all_single", "reduce"):
        setattr(dist, name, counting(name, getattr(dist, name)))
    collectives._all_gather = counting("all_gather", collectives._all_gather)
    collectives._reduce_scatter = counting("reduce_scatter", collectives._reduce_scatter)
    return counts


def _all_forms(rank, world_size, dtype, vocab_size, counted):
    """Return this rank's results and gradients in every form, and the collectives of each forward and backward."""
    import torch.distributed as dist

    from megatron_egrsd.vocab_parallel import linear_log_prob_and_entropy, log_prob_and_entropy, log_ratio

    group = None
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        group = dist.group.WORLD
    hidden, weight, target, g, h = _case(dtype)
    shard = weight.chunk(world_size)[rank]
    arguments = dict(group=group, vocab_size=vocab_size, temperature=0.8, entropy_grad=True)
    counts = _count_collectives() if counted else collections.Counter()
    out = {}

    def record(name, forward, leaves):
        counts.clear()
        log_prob, entropy = forward()
        out[name + " forward collectives"] = dict(counts)
        counts.clear()
        gradients = torch.autograd.grad((log_prob * g).sum() + (entropy * h).sum(), leaves)
        out[name + " backward collectives"] = dict(counts)
        out[name] = (log_prob.detach(), entropy.detach(), *gradients)

    logits = (hidden @ shard.T).requires_grad_()
    record("logits", lambda: log_prob_and_entropy(logits, target, **arguments), (logits,))
    mine, part = hidden.clone().requires_grad_(), shard.clone().requires_grad_()
    record("linear", lambda: linear_log_prob_and_entropy(mine, part, target, chunk_size=50, **arguments), (mine, part))
    if TOKENS[1] % world_size == 0:
        sequence = hidden.transpose(0, 1).contiguous()  # [S, B, D], as Megatron has it
        own = sequence.chunk(world_size)[rank].clone().requires_grad_()
        transposed = target.T.contiguous()

        def sequence_parallel():
            lp, entropy = linear_log_prob_and_entropy(own, part, transposed, sequence_parallel=True, **arguments)
            return lp.T, entropy.T

        record("sequence parallel", sequence_parallel, (own, part))
    counts.clear()
    ratio = log_ratio(logits.detach(), logits.detach() * 0.5, target, group=group, vocab_size=vocab_size)
    out["ratio collectives"], out["ratio"] = dict(counts), tuple(ratio)
    if world_size > 1:
        dist.destroy_process_group()
    file = io.BytesIO()  # a tensor sent directly is a file of a process that has ended by then
    torch.save(out, file)
    return file.getvalue()


def _on_ranks(ranks, *arguments):
    results = run_ranks(_all_forms, ranks, *arguments) if ranks > 1 else [_all_forms(0, 1, *arguments)]
    return [torch.load(io.BytesIO(result), weights_only=True) for result in results]


def _close(got, want, relative):
    return (got.double() - want.double()).norm() <= relative * want.double().norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [VOCAB, None])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_shards_agree_with_one(ranks, vocab_size, dtype):
    if ranks == 8 and (vocab_size is None or dtype != torch.float32):
        pytest.skip("eight processes take long to start on two cores: one case of them")
    (one,) = _on_ranks(1, dtype, vocab_size, False)
    parts = _on_ranks(ranks, dtype, vocab_size, False)
    for name in ("logits", "linear", "ratio"):
        for rank in range(ranks):  # every rank holds every token's values
            for got, want in zip(parts[rank][name][:2], one[name][:2], strict=True):
                assert (got - want).abs().max() <= 1e-6 * max(1, want.abs().max()), (name, rank)
    relative = 1e-6 if dtype == torch.float32 else 4e-3  # bf16 sums of gradients: the rounding of their type
    joined = torch.cat([p["logits"][2] for p in parts], -1)
    assert _close(joined, one["logits"][2], 1e-6)  # element-wise: rounded from the same fp32 values
    assert (joined[..., vocab_size:] == 0).all() if vocab_size else True
    for rank in range(ranks):
        assert _close(parts[rank]["linear"][2], one["linear"][2], relative)
    assert _close(torch.cat([p["linear"][3] for p in parts]), one["linear"][3], relative)
    if "sequence parallel" in parts[0]:
        gradient = torch.cat([p["sequence parallel"][2] for p in parts]).transpose(0, 1)
        assert _close(gradient, one["linear"][2], relative)
        assert _close(parts[0]["sequence parallel"][0], one["linear"][0], relative)


def test_collectives_are_one_in_forward_and_none_in_backward():
    for out in _on_ranks(2, torch.float32, VOCAB, True):
        assert out["logits forward collectives"] == {"all_gather": 1}
        assert out["logits backward collectives"] == {}
        assert out["ratio collectives"] == {"all_gather": 1}
        assert out["linear forward collectives"] == {"all_gather": 1}
        assert out["linear backward collectives"] == {"all_reduce": 1}
        # the sequence's gather and scatter, which a column-parallel layer makes too
        assert out["sequence parallel forward collectives"] == {"all_gather": 2}
        assert out["sequence parallel backward collectives"] == {"reduce_scatter": 1}


def _a_shard_of_padding(rank, world_size):
    import torch.distributed as dist

    from megatron_egrsd.vocab_parallel import log_prob_and_entropy

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    logits = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 10, 60, -100, 3])
    leaf = logits[:, rank * 64 : rank * 64 + 64].clone().requires_grad_()
    log_prob, entropy = log_prob_and_entropy(leaf, target, group=dist.group.WORLD, vocab_size=61)
    log_prob.sum().backward()
    expected = log_prob_and_entropy(logits, target, vocab_size=61)
    assert torch.allclose(log_prob, expected[0], atol=1e-6) and torch.allclose(entropy, expected[1], atol=1e-6)
    assert bool((leaf.grad == 0).all()) == (rank == 1)
    try:
        log_prob_and_entropy(leaf, target, group=dist.group.WORLD, vocab_size=129)
    except ValueError as error:
        assert "vocab_size 129" in str(error)
    else:
        raise AssertionError("vocab_size beyond the shards was accepted")
    dist.destroy_process_group()


def test_a_tiny_vocabulary_may_leave_a_rank_only_padding():
    run_ranks(_a_shard_of_padding, 2, timeout=120)
