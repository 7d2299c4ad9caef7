"""The properties of docs/reference/method.md, over ragged packed batches."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.config_reader import preset_objective
from megatron_egrsd.objectives.egrsd import confidence, entropy_quantile, lookahead_min
from megatron_egrsd.objectives.interface import Tokens, weigh
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.objectives.loss import loss_normalizer, policy_loss
from megatron_egrsd.objectives.signal import advantages
from tests.ranks import run_ranks

GRPO, RLSD, EGRSD = (preset_objective(name) for name in ("grpo", "rlsd", "egrsd"))


@st.composite
def batches(draw) -> Tokens:
    """Draw responses of ragged length, some empty; values with the extremes mixed in."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    lengths = lengths if sum(lengths) else [3]
    total = sum(lengths)
    values = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
    signal = st.sampled_from([-2.0, -1e-3, 0.0, 0.7, 1.0])
    advantage = torch.tensor(draw(st.lists(signal, min_size=len(lengths), max_size=len(lengths))))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Tokens(
        cu_seqlens,
        advantage.repeat_interleave(cu_seqlens.diff()),
        teacher_log_prob=-torch.rand(total, generator=values) * scale,
        student_log_prob=-torch.rand(total, generator=values) * scale,
        teacher_entropy=torch.rand(total, generator=values) * min(scale, 5.0),
    )


def weights(tokens: Tokens, config: ObjectiveConfig) -> torch.Tensor:
    return weigh(load_objective(config), tokens, vocab_size=100)[0]


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
def test_attenuation_zero_is_rlsd_bit_for_bit(tokens, config):
    open_gate = dataclasses.replace(config, attenuation=0.0)
    rlsd = dataclasses.replace(RLSD, mix=config.mix, ratio_clip=config.ratio_clip)
    assert torch.equal(weights(tokens, open_gate), weights(tokens, rlsd))


@given(batches(), configs)
def test_mix_and_attenuation_zero_is_grpo_bit_for_bit(tokens, config):
    w = weights(tokens, dataclasses.replace(config, attenuation=0.0, mix=0.0))
    assert torch.equal(w, tokens.advantage) and torch.equal(w, weights(tokens, GRPO))


@given(batches(), configs)
def test_lookahead_zero_is_egrsd_and_weights_grow_with_it(tokens, config):
    at = [weights(tokens, dataclasses.replace(config, lookahead=k)).abs() for k in range(8)]
    none = dataclasses.replace(config, lookahead=0)
    found = confidence(tokens.teacher_entropy, tokens.cu_seqlens, none, vocab_size=100)
    assert torch.equal(found.gate, 1 - config.attenuation * found.normalized_entropy)
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(at))


@given(batches(), configs)
def test_sign_and_bounds(tokens, config):
    w, a = weights(tokens, config), tokens.advantage
    assert not w.requires_grad and torch.isfinite(w).all()
    low = a.abs() * (1 - config.attenuation) * (1 - config.mix * config.ratio_clip)
    high = a.abs() * (1 + config.mix * config.ratio_clip)
    tolerance = 1e-6 * a.abs()
    assert (w.abs() >= low - tolerance).all() and (w.abs() <= high + tolerance).all()
    if config.mix * config.ratio_clip < 1:
        assert torch.equal(torch.sign(w), torch.sign(a))


@given(batches(), configs, st.randoms())
def test_packing_order_does_not_matter(tokens, config, random):
    cu = tokens.cu_seqlens.tolist()
    order = list(range(len(cu) - 1))
    random.shuffle(order)
    index = torch.cat([torch.arange(cu[i], cu[i + 1]) for i in order])
    moved = {k: v[index] for k, v in vars(tokens).items() if isinstance(v, torch.Tensor) and k != "cu_seqlens"}
    lengths = [cu[i + 1] - cu[i] for i in order]
    permuted = Tokens(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), **moved)
    assert torch.equal(weights(permuted, config), weights(tokens, config)[index])


def test_log_ratio_raises_right_and_lowers_wrong_where_the_teacher_agrees():
    tokens = Tokens(
        torch.tensor([0, 2, 4], dtype=torch.int32),
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        teacher_log_prob=torch.tensor([-0.9, -1.1, -0.9, -1.1]),
        student_log_prob=torch.full((4,), -1.0),
        teacher_entropy=torch.zeros(4),
    )
    up, down = (0.5 + 0.5 * math.exp(d) for d in (0.1, -0.1))
    assert weights(tokens, RLSD).tolist() == pytest.approx([up, down, -down, -up], rel=1e-6)


def test_lookahead_keeps_a_transient_spike_and_attenuates_a_sustained_one():
    h = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    assert lookahead_min(h, torch.tensor([0, 9], dtype=torch.int32), 2).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    # The next sequence's certainty is not this one's.
    two = torch.tensor([0, 5, 9], dtype=torch.int32)
    assert lookahead_min(h, two, 9)[:5].tolist() == [0, 0, 0, 1, 1]


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_exact(values, q):
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q)
    torch.testing.assert_close(entropy_quantile(torch.tensor(values), q).double(), expected, rtol=1e-5, atol=1e-6)


def test_quantile_of_no_tokens_and_its_floor():
    config = dataclasses.replace(EGRSD, entropy_quantile_floor=0.5)
    found = confidence(torch.tensor([0.1, 0.05, 0.0]), torch.tensor([0, 3], dtype=torch.int32), config)
    assert found.normalized_entropy.tolist() == pytest.approx([0.2, 0.1, 0.0])
    assert entropy_quantile(torch.zeros(0), 0.95) == 0


def _global_quantile(rank, world_size):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    everything = torch.rand(37, generator=torch.Generator().manual_seed(0))
    bounds = [0, 0, 9, 37]  # one rank has no token at all
    own = everything[bounds[rank] : bounds[rank + 1]]
    result = entropy_quantile(own, 0.95, group=dist.group.WORLD)
    dist.destroy_process_group()
    return torch.equal(result, entropy_quantile(everything, 0.95))


@pytest.mark.heavy
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
def test_loss_and_gradient_against_fp64(tokens, normalization):
    config = ObjectiveConfig(loss_normalization=normalization, fixed_length=7, importance_cap=1.5)
    old, w = tokens.student_log_prob, weights(tokens, config)
    log_prob = (old + torch.linspace(-0.4, 0.4, old.numel())).requires_grad_()
    lengths = tokens.cu_seqlens.diff()
    normalizer = loss_normalizer(lengths, config, num_tokens=old.numel(), num_sequences=lengths.numel())
    drift = torch.linspace(1.0, -0.5, old.numel())  # log pi_old / pi_rollout: some are cut at the cap, some are not
    result = policy_loss(log_prob, old, w, normalizer, config, rollout_log_prob=old - drift)
    result.loss.backward()

    expected, importance, gradient = 0.0, 0.0, []
    for t in range(old.numel()):
        ratio, wt = math.exp(float(log_prob[t].detach().double() - old[t].double())), float(w[t])
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        c = min(math.exp(float(old[t].double() - (old - drift)[t].double())), 1.5)
        importance += c
        expected -= c * min(ratio * wt, clipped * wt) / float(normalizer[t])
        gradient.append(0.0 if clipped * wt < ratio * wt else -c * ratio * wt / float(normalizer[t]))
    assert result.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert result.importance.item() == pytest.approx(importance, rel=1e-5)
    assert log_prob.grad.tolist() == pytest.approx(gradient, rel=1e-4, abs=1e-6)
    assert result.tokens == old.numel()


@given(batches(), st.floats(0.01, 10))
def test_kl_and_its_gradient_against_fp64(tokens, kl_coef):
    """beta (e^d - d - 1) / N: its derivative by log pi_theta is beta (1 - e^d) / N."""
    old = tokens.student_log_prob
    config, zero = ObjectiveConfig(kl_coef=kl_coef), torch.zeros_like(old)
    reference = old + torch.linspace(-2, 2, old.numel())  # log pi_ref - log pi_theta
    log_prob = old.clone().requires_grad_()
    result = policy_loss(log_prob, old, zero, 8.0, config, reference_log_prob=reference)
    result.loss.backward()
    d = reference.double() - old.double()
    kl = d.exp() - d - 1
    assert result.loss.item() == pytest.approx(kl_coef * float(kl.sum()) / 8, rel=1e-4, abs=1e-6)
    assert result.kl.item() == pytest.approx(float(kl.sum()), rel=1e-4, abs=1e-6) and (kl >= 0).all()
    torch.testing.assert_close(log_prob.grad.double(), kl_coef * (1 - d.exp()) / 8, rtol=1e-4, atol=1e-5)


def test_normalizers_sum_to_what_they_mean():
    lengths = torch.tensor([3, 1, 6])
    for normalization, total in [("token_mean", 1.0), ("seq_mean", 1.0), ("fixed", 10 / (5 * 3))]:
        config = ObjectiveConfig(loss_normalization=normalization, fixed_length=5)
        n = loss_normalizer(lengths, config, num_tokens=10, num_sequences=3)
        assert (1 / n).sum().item() == pytest.approx(total)


def test_missing_inputs_are_named():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="rollout_log_prob"):
        policy_loss(one, one, one, 1.0, ObjectiveConfig(importance_cap=2.0))
    with pytest.raises(ValueError, match="reference_log_prob"):
        policy_loss(one, one, one, 1.0, ObjectiveConfig(kl_coef=0.1))
    with pytest.raises(ValueError, match="vocab_size"):
        confidence(one, torch.tensor([0, 1]), ObjectiveConfig(entropy_normalization="log_vocab"))
