"""Adapters train as PEFT trains them, in every layout, and nothing else moves.

The other implementation of the method is tests/reference/algorithm1.py, with PEFT's own layers.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_egrsd.config import LoraConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.data.samples import load_rollouts, save_rollouts
from megatron_egrsd.hf.adapter_file import AdapterFile, save_adapter
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_shapes, adapter_spec
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.objectives.signal import History
from tests.parallel.test_algorithm1 import (  # noqa: F401 (fixtures)
    LAYOUTS,
    assert_same_moves,
    assert_same_numbers,
    batches,
    configuration,
    model,
)
from tests.ranks import run_ranks
from tests.reference.algorithm1 import Settings, read_rollouts, train
from tests.training import GROUPS, made_up_rollouts, open_engine, training_config

SPEC = AdapterSpec(4, 6.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:  # noqa: F811
    """An adapter in PEFT's format, neither A nor B of which is zero."""
    path = tmp_path_factory.mktemp("lora") / "adapter"
    g = torch.Generator().manual_seed(1)
    shapes = adapter_shapes(Architecture.from_pretrained(model), SPEC)
    save_adapter(((n, 0.1 * torch.randn(shape, generator=g)) for n, shape in shapes.items()), SPEC, model, path)
    return path


@pytest.fixture(scope="module")
def expected(model, batches, adapter):  # noqa: F811
    """Three steps by the other implementation: (steps, final adapter)."""
    settings = Settings(gamma=0.8, longest=48, warmup_steps=1, lr=1e-3, clip_norm=0.1)
    return train(model, [read_rollouts(p) for p in sorted(batches.glob("*.jsonl"))], settings, adapter)


def _train_on_rank(rank, world_size, config, directory):
    """Return (metrics of every step, final adapter, whether the frozen weights are as before)."""
    from megatron_egrsd.learn import learn

    metrics, history = [], History()
    with open_engine(config) as engine:
        frozen = {n: p.clone() for chunk in engine.chunks for n, p in chunk.named_parameters() if not p.requires_grad}
        for path in sorted(directory.glob("*.jsonl")):
            rollouts = load_rollouts(path)
            result, history = learn(engine, rollouts, config, history=history)
            metrics.append(result)
        after = {n: p for chunk in engine.chunks for n, p in chunk.named_parameters() if not p.requires_grad}
        same = all(torch.equal(frozen[name], p) for name, p in after.items())
        return metrics, {name: tensor.clone().numpy() for name, tensor in engine.export_adapter()}, same


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, marks=() if x in ("TP2 SP", "PP2", "DP2 distributed optimizer") else pytest.mark.slow)
        for x in LAYOUTS
    ],
)
def test_three_steps_are_those_of_peft(layout, model, batches, adapter, expected, tmp_path):  # noqa: F811
    ranks, parallel = LAYOUTS[layout]
    config = configuration(model, batches, tmp_path / "run", "cl_egrsd", parallel, gamma=0.8)
    config = dataclasses.replace(config, lora=LoraConfig(init=str(adapter)))
    answers = run_ranks(_train_on_rank, ranks, config, batches)
    assert all(same for _, _, same in answers), "a frozen weight has changed"
    metrics, after, _ = answers[0]
    for got, want in zip(metrics, expected[0], strict=True):
        assert_same_numbers(got, want, loss=1e-5)
    before = AdapterFile(adapter, Architecture.from_pretrained(model))
    assert set(after) == set(before.shapes) == set(expected[1])
    assert_same_moves({name: torch.from_numpy(tensor) for name, tensor in after.items()}, before, expected[1])


def _merge_on_rank(rank, world_size, config):
    with open_engine(config) as engine:
        everything = {name: tensor.clone().numpy() for name, tensor in engine.export_weights()}
        adapted = {name: tensor.clone().numpy() for name, tensor in engine.export_weights(adapted_only=True)}
    return everything, adapted


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}])
def test_merged_weights_are_those_of_peft(parallel, model, adapter):  # noqa: F811
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).double()
    expected = merged.merge_and_unload().state_dict()
    config = training_config(model, lora=LoraConfig(init=str(adapter)), parallel=ParallelConfig(**parallel))
    everything, adapted = run_ranks(_merge_on_rank, 2, config)[0]
    base = load_file(model / "model.safetensors")
    assert everything.keys() == base.keys() and list(adapted) == [n for n in everything if "_proj." in n]
    for name, weight in everything.items():
        assert (torch.from_numpy(weight) == expected[name].float()).all(), name  # rounded once, from fp64
        assert (name in adapted) == bool((torch.from_numpy(weight) != base[name]).any()), name
        assert name not in adapted or (weight == adapted[name]).all()


def _score_on_rank(rank, world_size, config, rollouts):
    """Return, of a new adapter: whether teacher, reference and student score alike, and the numbers of elements."""
    from megatron_egrsd.data.packing import Sequence
    from megatron_egrsd.learn import learn

    rollouts = load_rollouts(rollouts)
    sequences = [Sequence(r.prompt.student_ids, r.response_ids) for r in rollouts]
    with open_engine(config) as engine:
        partition = engine.partition([len(s) for s in sequences])
        first = {name: engine.score(sequences, partition, name) for name in ("current", "teacher", "reference")}
        metrics, _ = learn(engine, rollouts, config)
        last = {name: engine.score(sequences, partition, name) for name in first}
        copies = sum(w.numel() for w in (engine.teacher_weights or []) + (engine.reference_weights or []))
        trained = sum(p.numel() for p in engine.trainable())
        gradients = sum(b.numel() for b in engine.gradients())
        moments = [t for o in engine.optimizer.optimizer.state.values() for n, t in o.items() if n != "step"]

    def alike(scores, name):
        return all(
            torch.equal(s.log_prob, other.log_prob) and torch.equal(s.entropy, other.entropy)
            for s, other in zip(scores["current"].values(), scores[name].values(), strict=True)
        )

    unmoved = all(
        torch.equal(first["reference"][i].log_prob, last["reference"][i].log_prob) for i in first["reference"]
    )
    equal = {name: (alike(first, name), alike(last, name)) for name in ("teacher", "reference")}
    return equal, unmoved, metrics["loss/kl"], copies, trained, gradients, sum(t.numel() for t in moments)


@pytest.mark.parametrize("teacher", ["frozen", "live", "ema", "snapshot"])
def test_teacher_and_reference_switch_the_adapter(teacher, model, tmp_path):  # noqa: F811
    """An adapter of zero scores as no adapter, bit for bit; no copy holds more than the adapter."""
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    lora = LoraConfig(rank=4)
    objective = dataclasses.replace(GROUPS, importance_cap=None, kl_coef=0.5)
    config = training_config(
        model, lora=lora, objective=objective, teacher=TeacherConfig(weights=teacher, snapshot_every=5)
    )
    ((equal, unmoved, kl, copies, trained, gradients, moments),) = run_ranks(
        _score_on_rank, 1, config, tmp_path / "rollouts.jsonl"
    )
    # After an update the live teacher is the student; all the others, and the reference, are no longer.
    assert equal == {"teacher": (True, teacher == "live"), "reference": (True, False)}
    assert unmoved and kl == 0
    shapes = adapter_shapes(Architecture.from_pretrained(model), adapter_spec(lora))
    size = sum(rows * columns for rows, columns in shapes.values())
    assert trained == size and moments == 2 * size and size <= gradients < size + 1000
    assert copies == (size if teacher in ("ema", "snapshot") else 0)


def test_new_adapters_are_alike_in_every_layout(model):  # noqa: F811
    lora = LoraConfig(rank=4)
    one, two = (
        run_ranks(_new_on_rank, ranks, training_config(model, lora=lora, parallel=ParallelConfig(tensor=ranks)))[0]
        for ranks in (1, 2)
    )
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def _new_on_rank(rank, world_size, config):
    with open_engine(config) as engine:
        return {name: tensor.clone().numpy() for name, tensor in engine.export_adapter()}
