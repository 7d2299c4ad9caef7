"""A run that was stopped and continued is the run that never stopped."""

import dataclasses

import pytest
import torch

from megatron_egrsd.config import OptimizerConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.samples import load_rollouts, save_rollouts
from tests.models import make_qwen3
from tests.parallel.test_layouts import VOCAB, _config, _rollouts, assert_same_training
from tests.ranks import run_ranks


def _train(rank, world_size, config, rollouts, directory, start, stop):
    """Steps start .. stop - 1, continuing from and leaving a checkpoint; (metrics, weights) from the first rank."""
    from megatron_egrsd.engine import checkpoint
    from megatron_egrsd.engine.engine import Engine
    from megatron_egrsd.learn import learn

    rollouts = load_rollouts(rollouts)
    with Engine(config) as engine:
        if start:
            assert checkpoint.load(engine, checkpoint.newest(directory)) == start
        metrics = [learn(engine, rollouts, config) for _ in range(start, stop)]
        checkpoint.save(engine, directory, stop, keep=2)
        weights = {name: tensor.clone().numpy() for name, tensor in engine.export_weights()}
    return (metrics, weights) if rank == 0 else None


def _run(world_size, *args):
    metrics, weights = run_ranks(_train, world_size, *args)[0]
    return metrics, {k: torch.from_numpy(v) for k, v in weights.items()}


@pytest.fixture
def setting(tmp_path):
    save_rollouts(_rollouts(), tmp_path / "rollouts.jsonl")
    model = make_qwen3(tmp_path / "model", vocab_size=VOCAB)
    config = _config(
        model,
        steps=4,
        teacher=TeacherConfig(weights="ema", ema_decay=0.5),
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=1),
    )
    return config, tmp_path / "rollouts.jsonl", tmp_path


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ParallelConfig(max_tokens_per_microbatch=256)),
        (2, ParallelConfig(max_tokens_per_microbatch=256, distributed_optimizer=True)),
        pytest.param(
            2, ParallelConfig(max_tokens_per_microbatch=256, tensor=2, sequence_parallel=True), marks=pytest.mark.slow
        ),
    ],
    ids=["TP1", "DP2 distributed optimizer", "TP2 SP"],
)
def test_resume_is_bit_identical(world_size, parallel, setting):
    config, rollouts, root = setting
    config = dataclasses.replace(config, parallel=parallel)
    metrics, weights = _run(world_size, config, rollouts, root / "whole", 0, 4)
    _run(world_size, config, rollouts, root / "parts", 0, 2)
    resumed, resumed_weights = _run(world_size, config, rollouts, root / "parts", 2, 4)
    for a, b in zip(resumed, metrics[2:], strict=True):
        assert {k: v for k, v in a.items() if "time/" not in k} == {k: v for k, v in b.items() if "time/" not in k}
    assert all(torch.equal(resumed_weights[k], v) for k, v in weights.items())


def test_resume_in_another_layout(setting):
    config, rollouts, root = setting
    metrics, weights = _run(1, config, rollouts, root / "whole", 0, 4)
    split = ParallelConfig(max_tokens_per_microbatch=256, pipeline=2, distributed_optimizer=True)
    sharded = dataclasses.replace(config, parallel=split)
    _run(2, sharded, rollouts, root / "parts", 0, 2)
    tensor = dataclasses.replace(config, parallel=ParallelConfig(max_tokens_per_microbatch=256, tensor=2,
                                                                 distributed_optimizer=True))  # fmt: skip
    assert_same_training(_run(2, tensor, rollouts, root / "parts", 2, 4), (metrics[2:], weights))


def test_only_complete_checkpoints_count_and_old_ones_go(setting, tmp_path):
    from megatron_egrsd.engine import checkpoint

    for name in ("step_000002", "step_000010", "step_000012.partial", "step_x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step_000010"
    assert checkpoint.newest(tmp_path / "none") is None
    config, rollouts, root = setting
    for start, stop in [(0, 1), (1, 2), (2, 3)]:
        _run(1, config, rollouts, root / "run", start, stop)
    assert sorted(p.name for p in (root / "run").iterdir()) == ["step_000002", "step_000003"]
