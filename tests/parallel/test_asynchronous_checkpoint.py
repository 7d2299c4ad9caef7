"""A checkpoint that is written while training goes on is the one that was saved at once."""

import dataclasses
import json
import shutil
import threading

import pytest
import torch

from megatron_egrsd.config import LoraConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.errors import RunError
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import VOCAB, made_up_rollouts, open_engine, take_steps, training_config


@pytest.fixture
def setting(tmp_path):
    model = make_qwen3(tmp_path / "model", vocab_size=VOCAB)
    return training_config(model, steps=4, teacher=TeacherConfig(weights="ema", ema_decay=0.5)), tmp_path


def _hold_writers() -> threading.Event:
    """Let no writer of this process begin before the event that is returned is set."""
    from megatron_egrsd.engine.checkpoint_writer import CheckpointWriter

    gate, write = threading.Event(), CheckpointWriter._write

    def held(self):
        assert gate.wait(120)
        write(self)

    CheckpointWriter._write = held
    return gate


def _save_both_ways(rank, world_size, config, root):
    from megatron_egrsd.engine import checkpoint

    rollouts = made_up_rollouts()
    with open_engine(config) as engine:
        take_steps(engine, rollouts, config, 1)
        checkpoint.save(engine, root / "at once", 1, 2, {})
        gate = _hold_writers()
        (root / "history").write_text("then")
        saving = checkpoint.save(engine, root / "meanwhile", 1, 1, {}, root / "history", background=True)
        take_steps(engine, rollouts, config, 1)  # changes weights, moments and teacher in place
        (root / "history").write_text("later")
        assert not saving.written() and checkpoint.complete(root / "meanwhile") == []
        gate.set()
        saving.publish()
        assert saving.written()
        if rank == 0:
            checkpoint.check(saving.path)
            assert (saving.path / checkpoint.METRICS_FILE).read_text() == "then"
            shutil.copytree(saving.path, root / "kept" / "step_000001")
        gate.clear()
        saving = checkpoint.save(engine, root / "meanwhile", 2, 1, {}, background=True)
        assert checkpoint.complete(root / "meanwhile") == [root / "meanwhile" / "step_000001"]  # not gone yet
        gate.set()
        saving.publish()
        assert checkpoint.complete(root / "meanwhile") == [saving.path]


def _tensor_files(path):
    files = json.loads((path / "integrity.json").read_text())["files"]
    return {name: value for name, value in files.items() if name.endswith(".distcp")}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"lora": LoraConfig(rank=4), "teacher": TeacherConfig()}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        (2, {"parallel": ParallelConfig(max_tokens_per_microbatch=256, tensor=2)}),
        pytest.param(
            2,
            {"parallel": ParallelConfig(max_tokens_per_microbatch=256, distributed_optimizer=True)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["LoRA", "TP1", "TP2", "DP2 distributed optimizer"],
)
def test_what_is_written_meanwhile_is_what_was_saved(world_size, changes, setting):
    config, root = setting
    run_ranks(_save_both_ways, world_size, dataclasses.replace(config, **changes), root)
    at_once, meanwhile = (_tensor_files(root / kind / "step_000001") for kind in ("at once", "kept"))
    assert at_once and meanwhile == at_once
    assert _tensor_files(root / "meanwhile" / "step_000002") != at_once


def _lose_the_directory(rank, world_size, config, root):
    """Every rank's error while the writer has no directory to write into, and what is there after the next save."""
    from megatron_egrsd.engine import checkpoint

    with open_engine(config) as engine:
        checkpoint.save(engine, root / "run", 1, 1, {})
        gate = _hold_writers()
        saving = checkpoint.save(engine, root / "run", 2, 1, {}, background=True)
        if rank == 0:
            shutil.rmtree(root / "run" / "step_000002.partial")
        torch.distributed.barrier()
        gate.set()
        with pytest.raises(RunError) as error:
            saving.publish()
        left = [path.name for path in checkpoint.complete(root / "run")]
        torch.distributed.barrier()
        path = checkpoint.save(engine, root / "run", 3, 1, {}).path
        if rank == 0:
            checkpoint.check(path)
    return str(error.value), left


@pytest.mark.heavy
def test_an_error_of_the_writer_is_one_sentence_on_every_rank_and_nothing_older_is_lost(setting):
    config, root = setting
    config = dataclasses.replace(config, parallel=ParallelConfig(max_tokens_per_microbatch=256, tensor=2))
    for sentence, left in run_ranks(_lose_the_directory, 2, config, root):
        assert "step_000002 could not be written: " in sentence and "\n" not in sentence
        assert left == ["step_000001"]
