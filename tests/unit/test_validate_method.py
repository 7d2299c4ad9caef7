"""The validation study's arithmetic, plan and objectives. docs/measurements/results.md has its results."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import RunError
from megatron_egrsd.objectives.interface import Tokens
from megatron_egrsd.objectives.load import check_objective, load_objective

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import paired  # noqa: E402
from benchmarks.validate_method import plan, results  # noqa: E402

exact = st.integers(-1024, 1024).map(lambda n: n / 1024)  # sums have no rounding, so equal values compare equal


@given(st.lists(exact, min_size=2, max_size=9))
def test_sign_flip_is_the_exact_permutation_test(values):
    pairs = np.array(values)
    found = stats.permutation_test(
        (pairs,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert paired.sign_flip(pairs) == pytest.approx(found.pvalue, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_adjusts_as_defined(p_values):
    """The i-th smallest adjusted p is the largest of (m - j) p_(j) up to i, and order of the input does not matter."""
    adjusted, m = paired.holm(p_values), len(p_values)
    ordered = sorted(p_values)
    expected = [min(1.0, max((m - j) * ordered[j] for j in range(i + 1))) for i in range(m)]
    assert sorted(adjusted) == pytest.approx(expected)
    assert all(a >= p - 1e-15 for a, p in zip(adjusted, p_values, strict=True))


def test_difference_is_the_paired_t_interval():
    pairs = np.random.default_rng(0).normal(0.01, 0.02, 16)
    found, expected = paired.difference(pairs), stats.ttest_1samp(pairs, 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (found.low90, found.high90) == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert found.within(1.0) and not found.within(0.001)


def test_an_interaction_is_the_difference_of_two_differences():
    columns = {"a/wrong": 0.9, "b/wrong": 0.7, "a": 0.95, "b": 0.9}
    rows = {name: {seed: {"accuracy": value + 0.001 * seed} for seed in range(3)} for name, value in columns.items()}
    rows["a"][7] = {"accuracy": 0.0}  # a seed that the others lack
    hypothesis = plan.Hypothesis("", "a/wrong", "b/wrong", minus=("a", "b"))
    assert results.pairs(rows, hypothesis, "accuracy") == pytest.approx([0.15] * 3)


def test_every_setting_of_the_plan_is_a_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = plan.settings("examples/extending/high_entropy.py:HighEntropy")
    assert found[-2].name == "tiny/cl_egrsd, HighEntropy"
    assert len({s.name for s in found}) == len(found)
    configs = {s.name: parse_config(["--config", plan.CONFIG, *s.options]) for s in found}
    for config in configs.values():
        check_objective(config.objective)
    for name, setting in plan.TITLES.items():
        assert setting and any(s.name.endswith(f"/{name}") for s in found)
    before = ObjectiveConfig(  # the settings that the study was made with, not the paper's
        advantage="group", length_bonus=0.0, mix=0.5, attenuation=0.9, lookahead=2, loss="ppo",
        entropy_normalization="quantile", entropy_floor=0.5,
    )  # fmt: skip
    members = {"grpo": {"mix": 0.0, "attenuation": 0.0, "lookahead": 0}, "rlsd": {"attenuation": 0.0, "lookahead": 0},
               "egrsd": {"lookahead": 0}, "cl_egrsd": {}}  # fmt: skip
    for name, changes in members.items():
        assert configs[f"tiny/{name}"].objective == replace(before, **changes)
        assert configs[f"tiny/{name}"].teacher.weights == "live"
    for hypothesis in plan.HYPOTHESES:
        assert {hypothesis.treatment, hypothesis.control, *(hypothesis.minus or ())} <= configs.keys()


def test_tables_go_between_their_marks_and_nowhere_else(tmp_path):
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    results.write_document({"a": "| new \\1 |"}, document)
    assert document.read_text() == "before\n<!-- a -->\n| new \\1 |\n<!-- /a -->\nafter\n"
    with pytest.raises(RunError, match="0 places for b"):
        results.write_document({"b": ""}, document)


def _tokens(lengths: list[int]) -> Tokens:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    values = [torch.rand(total, generator=generator) * 3 for _ in range(2)]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Tokens(bounds, torch.ones(total), -values[0], values[1])


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 9))
@settings(deadline=None)
def test_lookahead_mean_stays_in_its_response(lengths, lookahead):
    config = ObjectiveConfig(lookahead=lookahead, function=f"{ROOT}/examples/validation/objectives.py:LookaheadMean")
    tokens = _tokens(lengths)
    gate = load_objective(config).prepare(tokens, vocab_size=100)["gate"]
    plain = load_objective(ObjectiveConfig(lookahead=0)).prepare(tokens, vocab_size=100)["gate"]
    parts = [p.double() for p in plain.split(lengths)]
    expected = torch.cat([torch.stack([p[t : t + lookahead + 1].mean() for t in range(len(p))]) for p in parts])
    torch.testing.assert_close(gate.double(), expected, rtol=0, atol=1e-6)


def test_shuffled_gate_deals_the_same_values_out_anew():
    config = ObjectiveConfig(lookahead=0, function=f"{ROOT}/examples/validation/objectives.py:ShuffledGate")
    tokens = _tokens([40, 30])
    gates = [load_objective(config).prepare(tokens, vocab_size=100)["gate"] for _ in range(2)]
    plain = load_objective(ObjectiveConfig(lookahead=0)).prepare(tokens, vocab_size=100)["gate"]
    assert torch.equal(*gates) and not torch.equal(gates[0], plain)
    assert torch.equal(gates[0].sort().values, plain.sort().values)
