"""The properties of docs/method.md, over ragged packed batches."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.objective import (
    advantages,
    confidence_gate,
    entropy_quantile,
    lookahead_min,
    loss_normalizer,
    normalized_entropy,
    policy_loss,
    token_weights,
)
from tests.ranks import run_ranks

GRPO, RLSD, EGRSD, CL_EGRSD = (ObjectiveConfig.preset(n) for n in ("grpo", "rlsd", "egrsd", "cl_egrsd"))


@st.composite
def batches(draw):
    """A packed batch: prompts and responses of ragged length, some empty; values with the extremes mixed in."""
    spans = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=6))
    total = sum(p + r for p, r in spans)
    if not total:
        spans, total = [(1, 3)], 4
    values = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
    advantage = draw(st.lists(st.sampled_from([-2.0, -1e-3, 0.0, 0.7, 1.0]), min_size=len(spans), max_size=len(spans)))
    cu_seqlens = torch.tensor([0] + [p + r for p, r in spans]).cumsum(0, dtype=torch.int32)
    return {
        "advantage": torch.cat([torch.full((p + r,), a) for (p, r), a in zip(spans, advantage, strict=True)]),
        "teacher_log_prob": -torch.rand(total, generator=values) * scale,
        "student_log_prob": -torch.rand(total, generator=values) * scale,
        "teacher_entropy": torch.rand(total, generator=values) * min(scale, 5.0),
        "cu_seqlens": cu_seqlens,
        "mask": torch.cat([torch.arange(p + r) >= p for p, r in spans]),
    }


def weights(batch, config):
    return token_weights(**batch, config=config, vocab_size=100)


configs = st.builds(
    ObjectiveConfig,
    mix=st.sampled_from([0.0, 0.5, 1.0]),
    ratio_clip=st.sampled_from([0.0, 0.2, 1.0]),
    attenuation=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    lookahead=st.integers(0, 5),
    entropy_normalization=st.sampled_from(["quantile", "max", "log_vocab"]),
    entropy_quantile=st.sampled_from([0.5, 0.95, 1.0]),
    entropy_quantile_floor=st.sampled_from([0.0, 0.5]),
)


@given(batches(), configs)
def test_attenuation_zero_is_rlsd_bit_for_bit(batch, config):
    open_gate = dataclasses.replace(config, attenuation=0.0)
    rlsd = dataclasses.replace(RLSD, mix=config.mix, ratio_clip=config.ratio_clip)
    assert torch.equal(weights(batch, open_gate).weight, weights(batch, rlsd).weight)


@given(batches(), configs)
def test_mix_and_attenuation_zero_is_grpo_bit_for_bit(batch, config):
    w = weights(batch, dataclasses.replace(config, attenuation=0.0, mix=0.0)).weight
    assert torch.equal(w, torch.where(batch["mask"], batch["advantage"], 0.0))
    assert torch.equal(w, weights(batch, GRPO).weight)


@given(batches(), configs)
def test_lookahead_zero_is_egrsd_and_weights_grow_with_it(batch, config):
    at = [weights(batch, dataclasses.replace(config, lookahead=k)).weight.abs() for k in range(8)]
    h = normalized_entropy(batch["teacher_entropy"], batch["cu_seqlens"], batch["mask"], config, vocab_size=100)
    gate, _ = confidence_gate(
        batch["teacher_entropy"], batch["cu_seqlens"], batch["mask"], dataclasses.replace(config, lookahead=0),
        vocab_size=100,
    )  # fmt: skip
    assert torch.equal(gate, 1 - config.attenuation * h)
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(at))


@given(batches(), configs)
def test_sign_bounds_and_mask(batch, config):
    result, mask, a = weights(batch, config), batch["mask"], batch["advantage"]
    w = result.weight
    assert not w.requires_grad
    assert (w[~mask] == 0).all() and (result.normalized_entropy[~mask] == 0).all()
    assert torch.isfinite(w).all()
    low = a.abs() * (1 - config.attenuation) * (1 - config.mix * config.ratio_clip)
    high = a.abs() * (1 + config.mix * config.ratio_clip)
    tolerance = 1e-6 * a.abs()
    assert (w.abs() >= low - tolerance)[mask].all() and (w.abs() <= high + tolerance)[mask].all()
    if config.mix * config.ratio_clip < 1:
        assert torch.equal(torch.sign(w[mask]), torch.sign(a[mask]))


@given(batches(), configs, st.randoms())
def test_packing_order_does_not_matter(batch, config, random):
    cu = batch["cu_seqlens"].tolist()
    order = list(range(len(cu) - 1))
    random.shuffle(order)
    index = torch.cat([torch.arange(cu[i], cu[i + 1]) for i in order])
    lengths = [cu[i + 1] - cu[i] for i in order]
    permuted = {k: v[index] for k, v in batch.items() if k != "cu_seqlens"}
    permuted["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    assert torch.equal(weights(permuted, config).weight, weights(batch, config).weight[index])


def test_log_ratio_raises_right_and_lowers_wrong_where_the_teacher_agrees():
    batch = {
        "advantage": torch.tensor([1.0, 1.0, -1.0, -1.0]),
        "teacher_log_prob": torch.tensor([-0.9, -1.1, -0.9, -1.1]),
        "student_log_prob": torch.full((4,), -1.0),
        "teacher_entropy": torch.zeros(4),
        "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32),
        "mask": torch.ones(4, dtype=torch.bool),
    }
    up, down = (0.5 + 0.5 * math.exp(d) for d in (0.1, -0.1))
    assert weights(batch, RLSD).weight.tolist() == pytest.approx([up, down, -down, -up], rel=1e-6)


def test_lookahead_keeps_a_transient_spike_and_attenuates_a_sustained_one():
    h = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    cu = torch.tensor([0, 9], dtype=torch.int32)
    mask = torch.ones(9, dtype=torch.bool)
    assert lookahead_min(h, cu, mask, 2).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    # The next sequence's certainty is not this one's, nor is a prompt's.
    two = torch.tensor([0, 5, 9], dtype=torch.int32)
    assert lookahead_min(h, two, mask, 9)[:5].tolist() == [0, 0, 0, 1, 1]
    assert lookahead_min(h, cu, mask & (torch.arange(9) != 7), 9)[3:].tolist() == [1, 1, 1, 1, 0, 1]


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_exact(values, q):
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q)
    torch.testing.assert_close(entropy_quantile(torch.tensor(values), q).double(), expected, rtol=1e-5, atol=1e-6)


def test_quantile_of_no_tokens_and_its_floor():
    config = dataclasses.replace(EGRSD, entropy_quantile_floor=0.5)
    cu, mask = torch.tensor([0, 3], dtype=torch.int32), torch.ones(3, dtype=torch.bool)
    h = normalized_entropy(torch.tensor([0.1, 0.05, 0.0]), cu, mask, config)
    assert h.tolist() == pytest.approx([0.2, 0.1, 0.0])
    assert normalized_entropy(torch.ones(3), cu, ~mask, config).tolist() == [0, 0, 0]


def _global_quantile(rank, world_size):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    everything = torch.rand(37, generator=torch.Generator().manual_seed(0))
    bounds = [0, 0, 9, 37]  # one rank has no token at all
    own = everything[bounds[rank] : bounds[rank + 1]]
    result = entropy_quantile(own, 0.95, group=dist.group.WORLD)
    dist.destroy_process_group()
    return torch.equal(result, entropy_quantile(everything, 0.95))


def test_quantile_spans_the_data_parallel_ranks():
    assert run_ranks(_global_quantile, 3, timeout=60) == [True] * 3


def test_group_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.1, 0.1])
    groups = torch.tensor([4, 4, 4, 7, 7, 2, 2])
    a = advantages(rewards, groups, ObjectiveConfig())
    std = torch.tensor([1.0, 0.0, 0.0]).std().item()
    assert a[:3].tolist() == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std], rel=1e-5)
    assert a[3:].tolist() == [0.0] * 4  # all right or all alike: exactly no signal
    plain = advantages(rewards, groups, ObjectiveConfig(advantage_std=False))
    assert plain[:3].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert advantages(rewards, groups, ObjectiveConfig(advantage="outcome")).tolist() == [1, -1, -1, 1, 1, -1, -1]


@given(batches(), st.sampled_from(["token_mean", "seq_mean", "fixed"]))
def test_loss_and_gradient_against_fp64_and_exact_zero_outside_the_mask(batch, normalization):
    config = ObjectiveConfig(loss_normalization=normalization, fixed_length=7, importance_cap=1.5)
    mask, old = batch["mask"], batch["student_log_prob"]
    w = weights(batch, config).weight
    spread = torch.linspace(-0.4, 0.4, old.numel())
    log_prob = (old + spread).masked_fill(~mask, float("nan")).requires_grad_()
    lengths = torch.tensor([int(m.sum()) for m in mask.split(batch["cu_seqlens"].diff().tolist())])
    per_token = loss_normalizer(lengths, config, num_tokens=max(int(mask.sum()), 1), num_sequences=lengths.numel())
    normalizer = torch.ones_like(old).masked_scatter(mask, per_token)
    drift = torch.linspace(1.0, -0.5, old.numel())  # log pi_old / pi_rollout: some are cut at the cap, some are not
    result = policy_loss(log_prob, old, w, mask, normalizer, config, rollout_log_prob=old - drift)
    result.loss.backward()

    expected, importance = 0.0, 0.0
    for t in mask.nonzero().flatten().tolist():
        ratio = math.exp(float(log_prob[t].detach().double() - old[t].double()))
        wt = float(w[t])
        term = min(ratio * wt, min(max(ratio, 1 - config.clip_low), 1 + config.clip_high) * wt)
        c = min(math.exp(float(old[t].double() - (old - drift)[t].double())), 1.5)
        importance += c
        expected -= c * term / float(normalizer[t])
    assert result.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert result.importance.item() == pytest.approx(importance, rel=1e-5)
    assert (log_prob.grad[~mask] == 0).all()
    assert not log_prob.grad.isnan().any()
    assert result.tokens == mask.sum()


@given(batches(), st.floats(0.01, 10))
def test_kl_and_its_gradient_against_fp64(batch, kl_coef):
    """beta (e^d - d - 1) / N: its derivative by log pi_theta is beta (1 - e^d) / N, and nothing outside the mask."""
    mask, old = batch["mask"], batch["student_log_prob"]
    config, zero = ObjectiveConfig(kl_coef=kl_coef), torch.zeros_like(old)
    beyond = torch.linspace(-2, 2, old.numel())  # log pi_ref - log pi_theta
    reference = (old + beyond).masked_fill(~mask, float("nan"))
    log_prob = old.clone().masked_fill(~mask, float("nan")).requires_grad_()
    result = policy_loss(log_prob, old, zero, mask, 8.0, config, reference_log_prob=reference)
    result.loss.backward()
    d = (reference.double() - old.double())[mask]
    kl = d.exp() - d - 1
    assert result.loss.item() == pytest.approx(kl_coef * float(kl.sum()) / 8, rel=1e-4, abs=1e-6)
    assert result.kl.item() == pytest.approx(float(kl.sum()), rel=1e-4, abs=1e-6) and (kl >= 0).all()
    torch.testing.assert_close(log_prob.grad[mask].double(), kl_coef * (1 - d.exp()) / 8, rtol=1e-4, atol=1e-5)
    assert (log_prob.grad[~mask] == 0).all()


def test_normalizers_sum_to_what_they_mean():
    lengths = torch.tensor([3, 1, 6])
    for normalization, total in [("token_mean", 1.0), ("seq_mean", 1.0), ("fixed", 10 / (5 * 3))]:
        config = ObjectiveConfig(loss_normalization=normalization, fixed_length=5)
        n = loss_normalizer(lengths, config, num_tokens=10, num_sequences=3)
        assert (1 / n).sum().item() == pytest.approx(total)


def test_missing_inputs_are_named():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="rollout_log_prob"):
        policy_loss(one, one, one, one.bool(), 1.0, ObjectiveConfig(importance_cap=2.0))
    with pytest.raises(ValueError, match="reference_log_prob"):
        policy_loss(one, one, one, one.bool(), 1.0, ObjectiveConfig(kl_coef=0.1))
    with pytest.raises(ValueError, match="vocab_size"):
        normalized_entropy(
            one, torch.tensor([0, 1]), one.bool(), ObjectiveConfig(entropy_normalization="log_vocab")
        )  # fmt: skip
