"""The properties of docs/reference/method.md, over ragged packed batches; planted mistakes are found."""

import dataclasses
import itertools
import math
import statistics
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.objectives import egrsd, loss, signal
from megatron_egrsd.objectives.interface import Tokens, weigh
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.objectives.signal import History
from tests.mutants import mutant
from tests.presets import preset_objective
from tests.ranks import run_ranks

GRPO, RLSD, EGRSD, CL_EGRSD, GATE_OFF = (
    preset_objective(name) for name in ("grpo", "rlsd", "egrsd", "cl_egrsd", "gate_off")
)


@st.composite
def batches(draw) -> Tokens:
    """Draw responses of ragged length, some empty; values with the extremes mixed in."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    lengths = lengths if sum(lengths) else [3]
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
    signal = st.sampled_from([-2.0, -1e-3, 0.0, 0.7, 1.0])
    advantage = draw(st.lists(signal, min_size=len(lengths), max_size=len(lengths)))
    return tokens_of(lengths, advantage, scale, draw(st.integers(0, 2**31)))


def tokens_of(lengths: list[int], advantage: list[float], scale: float, seed: int) -> Tokens:
    total, values = sum(lengths), torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Tokens(
        cu_seqlens,
        torch.tensor(advantage).repeat_interleave(cu_seqlens.diff()),
        teacher_log_prob=-torch.rand(total, generator=values) * scale,
        student_log_prob=-torch.rand(total, generator=values) * scale,
        teacher_entropy=torch.rand(total, generator=values) * min(scale, 5.0),
    )


def weights(tokens: Tokens, config: ObjectiveConfig, history: History | None = None) -> torch.Tensor:
    return weigh(load_objective(config, history), tokens, vocab_size=100)[0]


configs = st.builds(
    ObjectiveConfig,
    mix=st.sampled_from([0.0, 0.5, 1.0]),
    ratio_clip=st.sampled_from([0.0, 0.2, 1.0]),
    attenuation=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    gate_floor=st.sampled_from([0.05, 0.1, 1.0]),
    lookahead=st.integers(0, 5),
    entropy_normalization=st.sampled_from(["batch_max", "quantile", "sequence_max", "log_vocab"]),
    entropy_quantile=st.sampled_from([0.5, 0.95, 1.0]),
    entropy_floor=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(batches(), configs)
@pytest.mark.heavy
def test_gamma_zero_is_the_ungated_objective_bit_for_bit(tokens, config):
    ungated = dataclasses.replace(GATE_OFF, mix=config.mix, ratio_clip=config.ratio_clip)
    assert torch.equal(weights(tokens, dataclasses.replace(config, attenuation=0.0)), weights(tokens, ungated))


@given(batches(), configs)
def test_without_gate_and_ratio_the_weight_is_the_advantage_bit_for_bit(tokens, config):
    w = weights(tokens, dataclasses.replace(config, attenuation=0.0, mix=0.0))
    assert torch.equal(w, tokens.advantage) and torch.equal(w, weights(tokens, GRPO))


@given(batches(), configs)
def test_window_zero_is_egrsd_bit_for_bit_and_weights_grow_with_the_window(tokens, config):
    at = [weights(tokens, dataclasses.replace(config, lookahead=w)).abs() for w in range(8)]
    none = dataclasses.replace(config, lookahead=0)
    found = egrsd.confidence(tokens.teacher_entropy, tokens.cu_seqlens, none, vocab_size=100)
    assert torch.equal(found.lookahead_entropy, found.normalized_entropy)
    assert torch.equal(weights(tokens, dataclasses.replace(CL_EGRSD, lookahead=0)), weights(tokens, EGRSD))
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(at))


@given(batches(), configs)
def test_sign_and_bounds(tokens, config):
    w, a = weights(tokens, config), tokens.advantage
    assert not w.requires_grad and torch.isfinite(w).all()
    low = a.abs() * max(config.gate_floor, 1 - config.attenuation) * (1 - config.mix * config.ratio_clip)
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


def test_the_ratio_raises_right_and_lowers_wrong_where_the_teacher_agrees():
    tokens = Tokens(
        torch.tensor([0, 2, 4], dtype=torch.int32),
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        teacher_log_prob=torch.tensor([-0.9, -1.1, -0.9, -1.5]),
        student_log_prob=torch.full((4,), -1.0),
        teacher_entropy=torch.zeros(4),
    )
    up, down = math.exp(0.1), math.exp(-0.1)
    assert weights(tokens, GATE_OFF).tolist() == pytest.approx([up, down, -down, -1.2], rel=1e-6)


def test_lookahead_keeps_a_transient_spike_and_attenuates_a_sustained_one():
    h = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    assert egrsd.lookahead_min(h, torch.tensor([0, 9], dtype=torch.int32), 2).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    # The next sequence's certainty is not this one's.
    two = torch.tensor([0, 5, 9], dtype=torch.int32)
    assert egrsd.lookahead_min(h, two, 9)[:5].tolist() == [0, 0, 0, 1, 1]


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_exact(values, q):
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q)
    torch.testing.assert_close(egrsd.entropy_quantile(torch.tensor(values), q).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalization", ["batch_max", "quantile"])
def test_the_scale_of_a_sure_batch_is_the_floor(normalization):
    config = dataclasses.replace(EGRSD, entropy_normalization=normalization)
    found = egrsd.confidence(torch.tensor([0.1, 0.05, 0.0]), torch.tensor([0, 3], dtype=torch.int32), config)
    assert found.normalized_entropy.tolist() == pytest.approx([0.1, 0.05, 0.0])
    nothing = torch.zeros(0), torch.tensor([0], dtype=torch.int32)
    assert egrsd.entropy_scale(*nothing, config) == 1.0


def _global_scales(rank, world_size):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    everything = 5 * torch.rand(37, generator=torch.Generator().manual_seed(0))
    bounds = [0, 0, 9, 37]  # one rank has no token at all
    own = everything[bounds[rank] : bounds[rank + 1]]
    equal = []
    for normalization in ("batch_max", "quantile"):
        config = dataclasses.replace(EGRSD, entropy_normalization=normalization)
        got = egrsd.entropy_scale(own, torch.tensor([0, len(own)]), config, group=dist.group.WORLD)
        equal.append(torch.equal(got, egrsd.entropy_scale(everything, torch.tensor([0, 37]), config)))
    dist.destroy_process_group()
    return all(equal)


@pytest.mark.heavy
def test_maximum_and_quantile_span_the_data_parallel_ranks():
    assert run_ranks(_global_scales, 3, timeout=60) == [True] * 3


# -- direction -------------------------------------------------------------------------------------------------------


def rollout(reward: float, length: int, finish_reason: str = "stop") -> Rollout:
    prompt = Prompt(Problem("1", "p", "a"), [1], [1])
    return Rollout(prompt, 0, [5] * length, [0.0] * length, finish_reason, 0, reward=reward)


def test_only_right_responses_get_the_length_bonus():
    batch = [rollout(1.0, 25), rollout(1.0, 100), rollout(0.0, 1), rollout(0.0, 100, "length"), rollout(0.3, 10)]
    assert signal.shaped_rewards(batch, EGRSD, 100) == pytest.approx([1.375, 1.0, 0.0, 0.0, 0.3])
    assert signal.shaped_rewards(batch, GRPO, 100) == [1.0, 1.0, 0.0, 0.0, 0.3]


@given(st.lists(st.lists(st.floats(0, 1.5), min_size=1, max_size=8), max_size=8))
def test_running_statistics_are_those_of_all_earlier_rewards(steps):
    history = History()
    for rewards in steps:
        history = history.after(rewards)
    every = [r for rewards in steps for r in rewards]
    assert (history.steps, history.count) == (len(steps), len(every))
    assert history.mean == pytest.approx(statistics.fmean(every) if every else 0.0, abs=1e-12)
    assert history.std == pytest.approx(statistics.stdev(every) if len(every) > 1 else 0.0, abs=1e-9)


def test_running_advantage_warms_up_and_never_sees_its_own_step():
    rewards, groups, history = [1.5, 0.0], torch.tensor([0, 1]), History()
    for _ in range(10):
        objective = load_objective(EGRSD, history)
        assert objective.advantages(torch.tensor(rewards), groups).tolist() == [1.0, -0.5]
        history = history.after(rewards)
    std = statistics.stdev(rewards * 10)
    got = load_objective(EGRSD, history).advantages(torch.tensor([1.2, 0.0, 0.75]), groups).tolist()
    assert got == pytest.approx([(r - 0.75) / (std + 1e-6) for r in (1.2, 0.0, 0.75)], rel=1e-6)


def test_running_advantage_without_warm_up_or_spread_is_finite():
    config = dataclasses.replace(EGRSD, advantage_warmup=0)
    for history in (History(), History().after([1.0]), History().after([0.0] * 9)):
        assert load_objective(config, history).advantages(torch.tensor([0.0, 1.0]), torch.zeros(2)).isfinite().all()


def test_a_running_advantage_of_a_reward_that_is_the_mean_is_exactly_0():
    config, history = dataclasses.replace(EGRSD, advantage_warmup=0), History().after([0.7] * 320)
    assert load_objective(config, history).advantages(torch.tensor([0.7]), torch.zeros(1)).tolist() == [0.0]


def test_group_and_outcome_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.1, 0.1])
    groups = torch.tensor([4, 4, 4, 7, 7, 2, 2])
    a = signal.advantages(rewards, groups, GRPO, History())
    std = torch.tensor([1.0, 0.0, 0.0]).std().item()
    assert a[:3].tolist() == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std], rel=1e-5)
    assert a[3:].tolist() == [0.0] * 4  # all right or all alike: exactly no signal
    plain = signal.advantages(rewards, groups, dataclasses.replace(GRPO, advantage_std=False), History())
    assert plain[:3].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    outcome = dataclasses.replace(GRPO, advantage="outcome")
    assert signal.advantages(rewards, groups, outcome, History()).tolist() == [1, -1, -1, 1, 1, -1, -1]


@pytest.mark.parametrize(("steps", "mix"), [(0, 0.5), (10, 0.4), (25, 0.25), (50, 0.0), (80, 0.0)])
def test_the_share_of_the_ratio_decays_in_rlsd(steps, mix):
    assert load_objective(RLSD, History(steps=steps)).mix == pytest.approx(mix)


# -- loss ------------------------------------------------------------------------------------------------------------


@given(batches(), st.sampled_from(["token_mean", "seq_mean", "fixed"]), st.sampled_from(["reinforce", "ppo"]))
def test_loss_and_gradient_against_fp64(tokens, normalization, kind):
    config = ObjectiveConfig(loss=kind, loss_normalization=normalization, fixed_length=7, importance_cap=1.5)
    old, w = tokens.student_log_prob, weights(tokens, config)
    log_prob = (old + torch.linspace(-0.4, 0.4, old.numel())).requires_grad_()
    lengths = tokens.cu_seqlens.diff()
    normalizer = loss.loss_normalizer(lengths, config, num_tokens=old.numel(), num_sequences=lengths.numel())
    drift = torch.linspace(1.0, -0.5, old.numel())  # log pi_old / pi_rollout: some are cut at the cap, some are not
    result = loss.policy_loss(log_prob, old, w, normalizer, config, rollout_log_prob=old - drift)
    result.loss.backward()

    expected, importance, gradient = 0.0, 0.0, []
    for t in range(old.numel()):
        now, wt, n = float(log_prob[t].detach().double()), float(w[t]), float(normalizer[t])
        ratio = math.exp(now - float(old[t].double()))
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        c = min(math.exp(float(old[t].double() - (old - drift)[t].double())), 1.5)
        importance += c
        if kind == "reinforce":
            expected -= c * wt * now / n
            gradient.append(-c * wt / n)
        else:
            expected -= c * min(ratio * wt, clipped * wt) / n
            gradient.append(0.0 if clipped * wt < ratio * wt else -c * ratio * wt / n)
    assert result.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert result.importance.item() == pytest.approx(importance, rel=1e-5)
    assert log_prob.grad.tolist() == pytest.approx(gradient, rel=1e-4, abs=1e-6)


@given(batches(), st.sampled_from([None, 2.0]))
def test_on_policy_clip_and_importance_weight_change_no_gradient(tokens, cap):
    """One update a batch: pi_theta is pi_old, and SGLang's log-probs are the engine's."""
    gradients = []
    for kind, importance_cap in (("reinforce", None), ("ppo", cap)):
        config = dataclasses.replace(EGRSD, loss=kind, importance_cap=importance_cap)
        log_prob = tokens.student_log_prob.clone().requires_grad_()
        old = log_prob.detach()
        loss.policy_loss(log_prob, old, weights(tokens, config), 8.0, config, rollout_log_prob=old).loss.backward()
        gradients.append(log_prob.grad)
    assert torch.equal(*gradients)


@given(batches(), st.floats(0.01, 10))
def test_kl_and_its_gradient_against_fp64(tokens, kl_coef):
    """beta (e^d - d - 1) / N: its derivative by log pi_theta is beta (1 - e^d) / N."""
    old = tokens.student_log_prob
    config, zero = ObjectiveConfig(kl_coef=kl_coef), torch.zeros_like(old)
    reference = old + torch.linspace(-2, 2, old.numel())  # log pi_ref - log pi_theta
    log_prob = old.clone().requires_grad_()
    result = loss.policy_loss(log_prob, old, zero, 8.0, config, reference_log_prob=reference)
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
        n = loss.loss_normalizer(lengths, config, num_tokens=10, num_sequences=3)
        assert (1 / n).sum().item() == pytest.approx(total)


def test_missing_inputs_are_named():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="rollout_log_prob"):
        loss.policy_loss(one, one, one, 1.0, ObjectiveConfig(importance_cap=2.0))
    with pytest.raises(ValueError, match="reference_log_prob"):
        loss.policy_loss(one, one, one, 1.0, ObjectiveConfig(kl_coef=0.1))
    with pytest.raises(ValueError, match="vocab_size"):
        egrsd.confidence(one, torch.tensor([0, 1]), ObjectiveConfig(entropy_normalization="log_vocab"))


# -- mistakes made on purpose ----------------------------------------------------------------------------------------

MISTAKES = {
    "maximum over the lookahead": ("egrsd", "torch.minimum(result", "torch.maximum(result"),
    "lookahead into the next response": ("egrsd", "torch.where(ids[k:] == ids[:-k], h[k:], torch.inf)", "h[k:]"),
    "lookahead one token short": ("egrsd", "range(1, min(lookahead, h.numel() - 1) + 1)", "range(1, lookahead)"),
    "no 1-nat floor": ("egrsd", "scale.clamp(min=config.entropy_floor)", "scale"),
    "mean for maximum": ("egrsd", "entropy.max()", "entropy.mean()"),
    "no gate floor": ("egrsd", ".clamp(config.gate_floor, 1)", ""),
    "gate of the raw entropy": ("egrsd", "config.attenuation * ahead", "config.attenuation * entropy"),
    "gate without lookahead": ("egrsd", "config.attenuation * ahead", "config.attenuation * h"),
    "direction left out of the ratio": ("egrsd", "torch.sign(advantage.float()) * delta", "delta"),
    "student over teacher": ("egrsd", "torch.exp(torch.sign", "torch.exp(-torch.sign"),
    "ratio not clipped above": (
        "egrsd",
        "ratio.clamp(1 - ratio_clip, 1 + ratio_clip)",
        "ratio.clamp(min=1 - ratio_clip)",
    ),
    "ratio not clipped below": (
        "egrsd",
        "ratio.clamp(1 - ratio_clip, 1 + ratio_clip)",
        "ratio.clamp(max=1 + ratio_clip)",
    ),
    "mixed with 1": ("egrsd", "return clipped if mix == 1 else", "return 0.5 + 0.5 * clipped if mix == 1 else"),
    "direction instead of advantage": (
        "egrsd",
        "return tokens.advantage * self.mag",
        "return tokens.advantage.sign() * self.mag",
    ),
    "bonus on wrong answers": ("signal", "if r.right else r.reward", "if True else r.reward"),
    "bonus for longer responses": ("signal", "(1 - len(r.response_ids)", "(len(r.response_ids)"),
    "bonus added, not multiplied": ("signal", "r.reward * (1 + config", "(r.reward + 1 + config"),
    "statistics without the mean": ("signal", "rewards.double() - history.mean", "rewards.double()"),
    "variance for deviation": ("signal", "(history.std + _STD_FLOOR)", "(history.std ** 2 + _STD_FLOOR)"),
    "population deviation": ("signal", "self.squares / (self.count - 1)", "self.squares / self.count"),
    "warm-up one step short": ("signal", "history.steps < config", "history.steps + 1 < config"),
    "warm-up baseline left out": ("signal", "return rewards - config.advantage_baseline", "return rewards"),
    "Welford without the second difference": ("signal", "difference * (reward - mean)", "difference * difference"),
    "steps not counted": ("signal", "History(self.steps + 1,", "History(self.steps,"),
    "loss of the other sign": ("loss", "-(importance * surrogate", "(importance * surrogate"),
    "mean of sequences": ("loss", "torch.full_like(lengths, num_tokens)", "lengths * num_sequences"),
}


VERIFIED = [0.0, 1.0, 0.3]  # wrong, right, partial credit of a user's reward
SIZES = [[7, 1, 12, 5], [30, 2], [9, 9, 9], [16]]


def everything(modules: dict[str, ModuleType]) -> list[float]:
    """Rewards, advantages, weights and loss of four batches, by the modules given."""
    history, numbers = modules["signal"].History(), []
    config = dataclasses.replace(CL_EGRSD, attenuation=1.0, advantage_warmup=2)
    for step, lengths in enumerate(SIZES):
        scale = 0.5 if step == 0 else 8.0  # the first batch is surer than 1 nat
        batch = [rollout(VERIFIED[(i + step) % 3], n) for i, n in enumerate(lengths)]
        rewards = modules["signal"].shaped_rewards(batch, config, 40)
        a = modules["signal"].advantages(torch.tensor(rewards), torch.arange(len(batch)), config, history)
        tokens = tokens_of(lengths, a.tolist(), scale, seed=step)
        objective = modules["egrsd"].EGRSD(config, history=history)
        w, _ = weigh(objective, tokens, vocab_size=100)
        n = torch.tensor(lengths)
        normalizer = modules["loss"].loss_normalizer(n, config, num_tokens=sum(lengths), num_sequences=len(lengths))
        lp = tokens.student_log_prob
        total = modules["loss"].policy_loss(lp, lp, w, normalizer, config).loss
        numbers += [*rewards, *a.tolist(), *w.tolist(), float(total)]
        history = history.after(rewards)
    return numbers


def expected_numbers() -> list[float]:
    """The same by plain Python, from the paper's formulas."""
    earlier, numbers = [], []
    for step, lengths in enumerate(SIZES):
        verified = [VERIFIED[(i + step) % 3] for i in range(len(lengths))]
        rewards = [v * (1 + 0.5 * (1 - n / 40)) if v > 0.5 else v for v, n in zip(verified, lengths, strict=True)]
        if step < 2:
            a = [r - 0.5 for r in rewards]
        else:
            a = [(r - statistics.fmean(earlier)) / (statistics.stdev(earlier) + 1e-6) for r in rewards]
        tokens = tokens_of(lengths, a, 0.5 if step == 0 else 8.0, seed=step)
        largest = max(1.0, tokens.teacher_entropy.max().item())
        weights, terms, start = [], 0.0, 0
        for advantage, n in zip(a, lengths, strict=True):
            h = tokens.teacher_entropy[start : start + n].tolist()
            for t in range(n):
                delta = float(tokens.teacher_log_prob[start + t] - tokens.student_log_prob[start + t])
                ratio = math.exp(math.copysign(1.0, advantage) * delta)
                gate = min(max(1 - min(h[t : t + 4]) / largest, 0.1), 1.0)
                weights.append(advantage * min(max(ratio, 0.8), 1.2) * gate)
                terms -= weights[-1] * float(tokens.student_log_prob[start + t])
            start += n
        numbers += [*rewards, *a, *weights, terms / sum(lengths)]
        earlier += rewards
    return numbers


REAL = {"egrsd": egrsd, "signal": signal, "loss": loss}


def test_a_run_of_four_steps_is_the_papers_formulas():
    assert everything(REAL) == pytest.approx(expected_numbers(), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name):
    module, old, new = MISTAKES[name]
    numbers = everything(REAL | {module: mutant(REAL[module], old, new)})
    assert numbers != pytest.approx(expected_numbers(), rel=2e-5, abs=1e-6)
