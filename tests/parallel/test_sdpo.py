"""SDPO and SRPO train as another implementation does, in every layout: top k and the rest, over a sharded vocabulary.

That one is tests/reference/sdpo.py: Hugging Face, PEFT and fp64. The rollouts are RLCSD's.
"""

import pytest

from megatron_egrsd.report.scored_dump import load_scores
from megatron_egrsd.report.token_page import render
from tests.parallel.test_algorithm1 import model  # noqa: F401 (a fixture)
from tests.parallel.test_distillation import LAYOUTS, SETTINGS, assert_adapter, assert_model
from tests.parallel.test_lora import adapter  # noqa: F401 (a fixture)
from tests.parallel.test_rlcsd import batches, run  # noqa: F401 (a fixture)
from tests.reference.algorithm1 import read_rollouts
from tests.reference.sdpo import train

TOP_K, DECAY = 5, 0.5  # so that the rest has weight, and the teacher moves
WORDS = ["--objective.options.top_k", str(TOP_K), "--teacher.ema_decay", str(DECAY)]


@pytest.fixture(scope="module")
def expected(model, batches, adapter):  # noqa: F811
    """Three steps by the other implementation: SDPO of all weights, SRPO of all weights and of an adapter."""
    read = [read_rollouts(p) for p in sorted(batches.glob("*.jsonl"))]
    settings = SETTINGS | {"top_k": TOP_K, "decay": DECAY}
    cases = {"sdpo": (False, None), "srpo": (True, None), "srpo, adapter": (True, adapter)}
    return {name: train(model, read, reinforces=r, adapter=a, **settings) for name, (r, a) in cases.items()}


def of(name: str) -> list[str]:
    return ["--objective.preset", name, *WORDS]


def assert_steps(metrics, steps):
    for got, (loss, grad_norm) in zip(metrics, steps, strict=True):
        assert got["loss/policy"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert got["optimizer/grad_norm"] == pytest.approx(grad_norm, rel=1e-5)


CASES = [(name, layout) for name in ("sdpo", "srpo") for layout in LAYOUTS]


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(*case, marks=pytest.mark.slow if case != ("sdpo", "TP2 SP") else ()) for case in CASES],
)
def test_three_steps(name, layout, model, batches, expected, tmp_path):  # noqa: F811
    metrics = run(model, batches, tmp_path / "run", *LAYOUTS[layout], objective=of(name))
    steps, weights = expected[name]
    assert_steps(metrics, steps)
    assert_model(tmp_path / "run", model, weights)


def test_a_stopped_run_continues_and_its_dumps_have_a_page(model, batches, expected, tmp_path):  # noqa: F811
    output, steps = tmp_path / "run", expected["srpo"][0]
    run(model, batches, output, 1, {}, "--steps", "2", "--checkpoint.every", "2", objective=of("srpo"))
    metrics = run(model, batches, output, 1, {}, "--checkpoint.resume", "auto", objective=of("srpo"))
    assert_steps(metrics, steps)
    assert_model(output, model, expected["srpo"][1])
    scored = load_scores(output / "scores" / "step_000003.jsonl")
    for r in scored:
        assert (r.weight > 0).all() == (r.advantage > 0) and (r.divergence > 0).any() == (r.advantage < 0)
    assert "SRPO (this run)" in render(scored, "run")


@pytest.mark.slow
def test_three_steps_with_adapters(model, batches, adapter, expected, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    words = ["--lora.init", str(adapter), "--lora.export", "adapter"]
    metrics = run(model, batches, output, *LAYOUTS["TP2 SP"], *words, objective=of("srpo"))
    steps, tensors = expected["srpo, adapter"]
    assert_steps(metrics, steps)
    assert_adapter(output, adapter, tensors)
