"""Objectives with a divergence over the full vocabulary train as another implementation does, in every layout.

That one is tests/reference/distillation.py: Hugging Face, PEFT and whole distributions in fp64.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_egrsd.config import LoraConfig, TeacherConfig
from megatron_egrsd.config.run import CheckpointConfig
from megatron_egrsd.report.scored_dump import load_scores
from megatron_egrsd.report.token_page import render
from tests.parallel.test_algorithm1 import STEPS, batches, configuration, model  # noqa: F401 (fixtures)
from tests.parallel.test_algorithm1 import _train_on_rank as train_on_rank
from tests.parallel.test_lora import adapter  # noqa: F401 (a fixture)
from tests.ranks import run_ranks
from tests.reference.algorithm1 import read_rollouts
from tests.reference.distillation import forward_kl, reverse_kl, train

LAYOUTS = {
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {"distributed_optimizer": True}),
    "CP2": (2, {"context": 2}),
}
# Adam divides by the gradient's size plus epsilon: one of the size of the gradients does not turn rounding into steps.
SETTINGS = {"temperature": 1.1, "lr": 1e-3, "adam_epsilon": 1e-3, "clip_norm": 0.1}
OPSD = functools.partial(forward_kl, clip=0.05)


@pytest.fixture(scope="module")
def expected(model, batches, adapter):  # noqa: F811
    """Three steps of OPSD by the other implementation, of all weights and of an adapter."""
    read = [read_rollouts(p) for p in sorted(batches.glob("*.jsonl"))]
    return {lora: train(model, read, OPSD, **SETTINGS, adapter=adapter if lora else None) for lora in (False, True)}


def run(model, batches, output, layout, preset="opsd", **changes):  # noqa: F811
    ranks, parallel = layout
    config = configuration(model, batches, output, preset, parallel, gamma=0.3)
    optimizer = dataclasses.replace(config.optimizer, eps=SETTINGS["adam_epsilon"])
    config = dataclasses.replace(config, optimizer=optimizer, **changes)
    run_ranks(train_on_rank, ranks, config)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_steps(metrics, steps):
    for got, (loss, grad_norm) in zip(metrics, steps, strict=True):
        assert got["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert got["optimizer/grad_norm"] == pytest.approx(grad_norm, rel=1e-5)


def assert_weights(after, before, expected):
    """Each has moved as expected to 1e-4 of the way, and to the rounding of each step to fp32."""
    for name, start in before.items():
        moved, rounding = (expected[name] - start.double()).norm(), STEPS * 2**-24 * expected[name].norm()
        assert moved > 0, name
        assert (after[name].double() - expected[name]).norm() < 1e-4 * moved + rounding, name


def assert_model(output, model, expected):  # noqa: F811
    before, after = (load_file(path / "model.safetensors") for path in (model, output / "hf"))
    assert_weights(after, before, expected)


def assert_adapter(output, adapter, expected):  # noqa: F811
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, output / "adapter"))
    assert_weights(after, before, expected)


def assert_run(output, metrics, model, expected):  # noqa: F811
    steps, weights = expected[False]
    assert_steps(metrics, steps)
    assert all(m["weight/abs_mean"] == 0 and m["batch/degenerate_share"] == 0 for m in metrics)
    assert_model(output, model, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_of_opsd(layout, model, batches, expected, tmp_path):  # noqa: F811
    assert_run(tmp_path / "run", run(model, batches, tmp_path / "run", LAYOUTS[layout]), model, expected)


def test_a_stopped_run_continues_and_its_dumps_have_a_page(model, batches, expected, tmp_path):  # noqa: F811
    """The teacher of the third step is the initial model, though the run began it with the weights of the second."""
    output, one_rank = tmp_path / "run", (1, {})
    run(model, batches, output, one_rank, steps=2, dump_scores=True, checkpoint=CheckpointConfig(every=2))
    metrics = run(model, batches, output, one_rank, dump_scores=True, checkpoint=CheckpointConfig(resume="auto"))
    assert_run(output, metrics, model, expected)
    for number, (loss, _) in enumerate(expected[False][0], 1):
        scored = load_scores(output / "scores" / f"step_{number:06d}.jsonl")
        assert np.mean([r.divergence.mean() for r in scored]) == pytest.approx(loss, rel=1e-5)
    assert "OPSD (this run)" in render(scored, "run")


@pytest.mark.parametrize("layout", ["TP2 SP", pytest.param("CP2", marks=pytest.mark.slow)])
def test_three_steps_of_opsd_with_adapters(layout, model, batches, adapter, expected, tmp_path):  # noqa: F811
    """The teacher is the model with its adapters off; one LM head serves both."""
    lora = LoraConfig(init=str(adapter), export="both")
    metrics = run(model, batches, tmp_path / "run", LAYOUTS[layout], lora=lora)
    steps, tensors = expected[True]
    assert_steps(metrics, steps)
    assert_adapter(tmp_path / "run", adapter, tensors)


@pytest.mark.parametrize("layout", ["TP2 SP", pytest.param("PP2", marks=pytest.mark.slow)])
def test_three_steps_of_crisp(layout, model, batches, tmp_path):  # noqa: F811
    """The third step's teacher is a copy of the student after the second."""
    read = [read_rollouts(p) for p in sorted(batches.glob("*.jsonl"))]
    expected = {False: train(model, read, reverse_kl, **SETTINGS, refresh=2)}
    teacher = TeacherConfig(weights="snapshot", snapshot_every=2)
    metrics = run(model, batches, tmp_path / "run", LAYOUTS[layout], preset="crisp", teacher=teacher)
    assert_run(tmp_path / "run", metrics, model, expected)


def test_the_clip_matters_here(expected, model, batches):  # noqa: F811
    """Else the comparison above would say nothing about it."""
    read = [read_rollouts(p) for p in sorted(batches.glob("*.jsonl"))][:1]
    ((loss, _),), _ = train(model, read, forward_kl, **SETTINGS)
    assert expected[False][0][0][0] < 0.9 * loss
