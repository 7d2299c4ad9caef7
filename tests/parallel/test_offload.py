"""The engine's memory is offloaded and restored: nothing is left on the device, and training is not changed."""

import dataclasses
import itertools

import pytest
import torch

from megatron_egrsd.config import ModelConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.data.samples import load_rollouts, save_rollouts
from megatron_egrsd.engine.offload import OffloadedStorages, without
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import GROUPS, held_tensors, made_up_rollouts, open_engine, storage_bytes, training_config


def _held(engine) -> int:
    """Return the bytes of all storages of parameters, gradients, optimizer and teacher."""
    return storage_bytes(itertools.chain(*held_tensors(engine).values()))


def _train(rank, world_size, config, path, turns):
    """Return the final weights after three steps, with the engine offloaded between them if `turns`."""
    from megatron_egrsd.learn import learn

    rollouts = load_rollouts(path)
    with open_engine(config) as engine:
        for _ in range(config.steps):
            if turns:
                full, weights = _held(engine), {name: t.clone() for name, t in engine.export_weights()}
                engine.offload(keep_weights=True)
                assert full > _held(engine) > 0
                engine.offload()
                assert _held(engine) == 0
                engine.offload()  # a second call does nothing
                engine.reload(only_weights=True)
                for name, tensor in engine.export_weights():
                    assert torch.equal(tensor, weights[name]), name
                engine.reload()
                assert _held(engine) == full
            metrics, _ = learn(engine, rollouts, config)
        weights = {name: tensor.float().numpy().copy() for name, tensor in engine.export_weights()}
    return metrics["loss/policy"], weights


LAYOUTS = {
    "fp32, KL": (1, "float32", {}, "live"),
    "bf16, moving average": (1, "bfloat16", {}, "ema"),
    "DP2 distributed optimizer": (2, "float32", {"distributed_optimizer": True}, "frozen"),
    "TP2": (2, "bfloat16", {"tensor": 2, "sequence_parallel": True, "distributed_optimizer": True}, "ema"),
    "PP2 VPP2": (2, "bfloat16", {"pipeline": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True}, "live"),
}
SLOW = {"bf16, moving average", "TP2", "PP2 VPP2"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LAYOUTS])
def test_training_is_the_same_bit_for_bit(name, tmp_path):
    ranks, dtype, parallel, teacher = LAYOUTS[name]
    model = make_qwen3(tmp_path / "model")
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    config = dataclasses.replace(
        training_config(
            model,
            teacher=TeacherConfig(weights=teacher),
            objective=dataclasses.replace(GROUPS, kl_coef=0.1 * ("KL" in name)),
        ),
        model=ModelConfig(path=str(model), dtype=dtype),
        parallel=ParallelConfig(max_tokens_per_microbatch=256, **parallel),
    )
    stayed, moved = (run_ranks(_train, ranks, config, tmp_path / "rollouts.jsonl", turns) for turns in (False, True))
    assert stayed[0][0] == moved[0][0]
    for weight, expected in stayed[0][1].items():
        assert (moved[0][1][weight] == expected).all(), weight


def test_views_share_what_comes_back():
    whole = torch.arange(10.0)
    part = whole[2:5]
    storages = OffloadedStorages(lambda: [whole, part])
    storages.offload()
    assert whole.untyped_storage().nbytes() == 0
    storages.restore()
    part += 1
    assert whole.tolist() == [0, 1, 3, 4, 5, 5, 6, 7, 8, 9]
    assert not without([part], [whole])


def test_what_numpy_has_seen_stays():
    whole = torch.arange(10.0)
    assert whole.numpy().sum() == 45
    storages = OffloadedStorages(lambda: [whole])
    storages.offload()
    storages.restore()
    assert whole.sum() == 45


def test_a_tensor_made_in_the_place_of_another_gets_its_own_copy():
    """A loaded checkpoint replaces Adam's moments, perhaps by tensors at the same address."""
    tensors = [torch.zeros(1000)]
    storages = OffloadedStorages(lambda: tensors)
    for size in (1000, 500, 2000, 500):
        tensors[0] = None
        tensors[0] = torch.full((size,), float(size))
        storages.offload()
        storages.restore()
        assert torch.equal(tensors[0], torch.full((size,), float(size)))
