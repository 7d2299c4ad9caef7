"""AntiSD trains as another implementation does, in every layout, with the gate's state from step to step.

That one is tests/reference/antisd.py: Hugging Face and fp64. The rollouts are RLCSD's.
"""

import pytest

from megatron_egrsd.report.scored_dump import load_scores
from megatron_egrsd.report.token_page import render
from tests.parallel.test_algorithm1 import model  # noqa: F401 (a fixture)
from tests.parallel.test_distillation import LAYOUTS, SETTINGS, assert_model
from tests.parallel.test_rlcsd import batches, run  # noqa: F401 (a fixture)
from tests.reference.algorithm1 import read_rollouts
from tests.reference.antisd import train

# One step of warm-up; the gate closes in a step whose median entropy is below that one's, and opens in one above it.
GATE = {"warmup": 1, "collapse": 1.0}
ANTISD = [
    *("--objective.preset", "antisd", "--data.teacher_context", "sibling"),
    *(word for name, value in GATE.items() for word in (f"--objective.options.{name}", str(value))),
]


@pytest.fixture(scope="module")
def expected(model, batches):  # noqa: F811
    return train(model, [read_rollouts(p) for p in sorted(batches.glob("*.jsonl"))], **SETTINGS, **GATE)


def assert_run(output, metrics, model, expected):  # noqa: F811
    steps, weights = expected
    for got, (loss, grad_norm, gate, _) in zip(metrics, steps, strict=True):
        assert got["loss/policy"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert got["optimizer/grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
        assert got["gate/mean"] == gate
    assert [m.get("history/gate") for m in metrics] == [None, *(gate for _, _, gate, _ in steps[1:])]
    assert metrics[0]["history/warm"] == pytest.approx(steps[0][3], rel=1e-5)
    assert_model(output, model, weights)


@pytest.mark.parametrize("layout", [pytest.param(x, marks=pytest.mark.slow if x != "TP2 SP" else ()) for x in LAYOUTS])
def test_three_steps(layout, model, batches, expected, tmp_path):  # noqa: F811
    metrics = run(model, batches, tmp_path / "run", *LAYOUTS[layout], objective=ANTISD)
    assert_run(tmp_path / "run", metrics, model, expected)


def test_a_stopped_run_continues_and_its_dumps_have_a_page(model, batches, expected, tmp_path):  # noqa: F811
    """The resumed run neither warms up anew nor forgets its gate."""
    output = tmp_path / "run"
    run(model, batches, output, 1, {}, "--steps", "2", "--checkpoint.every", "2", objective=ANTISD)
    metrics = run(model, batches, output, 1, {}, "--checkpoint.resume", "auto", objective=ANTISD)
    assert_run(output, metrics, model, expected)
    scored = load_scores(output / "scores" / "step_000003.jsonl")
    assert scored[0].history.notes["gate"] == expected[0][1][2]
    assert "AntiSD (this run)" in render(scored, "run")


def test_the_gate_matters_here(expected):
    """Else the comparison above would say little about it."""
    assert {gate for _, _, gate, _ in expected[0][1:]} == {0.0, 1.0}
