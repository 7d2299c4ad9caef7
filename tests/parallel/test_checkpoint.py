"""A run that was stopped and continued is the run that never stopped."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_egrsd.config import LoraConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.data.samples import save_rollouts
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.convert import ToHF
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import (
    PAPER,
    VOCAB,
    assert_resumes_bitwise,
    assert_resumes_in,
    made_up_rollouts,
    open_engine,
    run_steps,
    training_config,
)


@pytest.fixture
def setting(tmp_path):
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    model = make_qwen3(tmp_path / "model", vocab_size=VOCAB)
    config = training_config(
        model,
        steps=4,
        teacher=TeacherConfig(weights="ema", ema_decay=0.5),
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=1),
    )
    return config, tmp_path / "rollouts.jsonl", tmp_path


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        pytest.param(1, ParallelConfig(max_tokens_per_microbatch=256), marks=pytest.mark.slow),
        (2, ParallelConfig(max_tokens_per_microbatch=256, distributed_optimizer=True)),
        pytest.param(
            2, ParallelConfig(max_tokens_per_microbatch=256, tensor=2, sequence_parallel=True), marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            ParallelConfig(max_tokens_per_microbatch=64, context=2, distributed_optimizer=True),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["TP1", "DP2 distributed optimizer", "TP2 SP", "CP2 distributed optimizer"],
)
def test_resume_is_bit_identical(world_size, parallel, setting):
    config, rollouts, root = setting
    config = dataclasses.replace(config, parallel=parallel)
    assert_resumes_bitwise(world_size, config, rollouts, root, stop=2)


def test_resume_is_bit_identical_a_step_after_the_teachers_copy(setting):
    config, rollouts, root = setting
    teacher = TeacherConfig(weights="snapshot", snapshot_every=2)
    config = dataclasses.replace(config, steps=5, **PAPER | {"teacher": teacher})
    resumed = assert_resumes_bitwise(1, config, rollouts, root, stop=3)
    assert resumed[-1]["reward/running_std"] > 0


def test_resume_in_another_layout(setting):
    assert_resumes_in([{"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2}], *setting)


@pytest.mark.slow
def test_context_parallel_resumes_in_another_layout_and_back(setting):
    layouts = {"context": 2}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}
    assert_resumes_in([layout | {"max_tokens_per_microbatch": 64} for layout in layouts], *setting)


@pytest.mark.slow
def test_experts_resume_in_another_layout(setting):
    config, rollouts, root = setting
    model = make_qwen3(root / "mixture", tied=False, vocab_size=VOCAB, num_experts=6, num_hidden_layers=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(model)))
    assert_resumes_in([{"expert": 2}, {"tensor": 2, "sequence_parallel": True}], config, rollouts, root)


def test_a_checkpoint_converts_without_its_teacher(setting):
    config, rollouts, root = setting
    _, weights = run_steps(1, config, rollouts, root / "run", 0, 1)
    ToHF(root / "run" / "step_000001", root / "hf", like=root / "model").run()
    found = load_file(root / "hf" / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_an_adapters_checkpoint_is_no_model(setting):
    config, rollouts, root = setting
    config = dataclasses.replace(config, lora=LoraConfig(rank=2), teacher=TeacherConfig())
    run_steps(1, config, rollouts, root / "run", 0, 1)
    with pytest.raises(BadArgument, match=r"holds the adapter alone, .* take the run's output/hf"):
        ToHF(root / "run" / "step_000001", root / "hf", like=root / "model")


def test_only_complete_checkpoints_count(tmp_path):
    from megatron_egrsd.engine import checkpoint

    for name in ("step_000002", "step_000010", "step_000012.partial", "step_x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in checkpoint.complete(tmp_path / "checkpoints")] == ["step_000010", "step_000002"]
    assert checkpoint.complete(tmp_path / "none") == []


def test_old_checkpoints_go_and_the_best_stays(setting):
    config, _, root = setting
    run_ranks(_save_four, 1, config, root)
    assert sorted(p.name for p in (root / "newest").iterdir()) == ["step_000003", "step_000004"]
    best = sorted(p.name for p in (root / "best").glob("step_*"))
    assert best == ["step_000002", "step_000003", "step_000004"]
    assert (root / "late" / "best").read_text() == "step_000002"
    assert sorted(p.name for p in (root / "late").glob("step_*")) == ["step_000002", "step_000004"]


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path, monkeypatch):
    from megatron_egrsd.engine import checkpoint

    saving = checkpoint.Saving(tmp_path / "step_000002", keep=1, best=False)
    for path in (tmp_path / "step_000001", saving.partial):
        path.mkdir()
        (path / ".nfs01").touch()

    def busy(path, **_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        saving._rename()
    assert checkpoint.complete(tmp_path) == [saving.path]


def _save_four(rank, world_size, config, root):
    from megatron_egrsd.engine import checkpoint

    with open_engine(config) as engine:
        for step in (1, 2, 3, 4):
            checkpoint.save(engine, root / "newest", step, 2, {})
            checkpoint.save(engine, root / "best", step, 2, {}, best=step in (1, 2))
            checkpoint.save(engine, root / "late", step, 1, {}, best=step == 1)
            if step == 2:  # evaluated after it was saved
                checkpoint.name_best(root / "late", step)
                checkpoint.name_best(root / "late", 7)  # which is not there


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 1, to be copied before it is damaged."""
    root = tmp_path_factory.mktemp("saved")
    save_rollouts(made_up_rollouts(), root / "rollouts.jsonl")
    config = training_config(make_qwen3(root / "model", vocab_size=VOCAB), steps=4)
    run_steps(1, config, root / "rollouts.jsonl", root / "run", 0, 1)
    return root / "run" / "step_000001"


def test_the_other_optimizer_is_refused(saved):
    root = saved.parent.parent
    config = training_config(root / "model", steps=4, parallel=ParallelConfig(distributed_optimizer=True))
    with pytest.raises(AssertionError, match=r"was saved with parallel.distributed_optimizer false; continue with"):
        run_steps(1, config, root / "rollouts.jsonl", saved.parent, 1, 2)


def _load_with_extra_states(rank, world_size, config, path):
    """Load a checkpoint without extra state into norms that ask for it, as Transformer Engine's do."""
    from megatron_egrsd.engine import checkpoint, model

    class Norm(model.RMSNorm):
        given = "nothing"

        def get_extra_state(self):
            return torch.zeros(3, dtype=torch.uint8)

        def set_extra_state(self, state):
            self.given = state

    model.RMSNorm = Norm
    with open_engine(config) as engine:
        step, _ = checkpoint.load(engine, path)
        return step, [m.given for m in engine.chunks[0].modules() if isinstance(m, Norm)]


def test_a_checkpoint_without_the_extra_states_of_other_layers(saved):
    config = training_config(saved.parent.parent / "model", steps=4)
    ((step, given),) = run_ranks(_load_with_extra_states, 1, config, saved)
    assert step == 1 and given and set(given) == {None}


def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path):
    """The model has more layers than the checkpoint; torch's exception for that is no subclass of Exception."""
    root = saved.parent.parent
    config = training_config(make_qwen3(tmp_path / "deeper", vocab_size=VOCAB, num_hidden_layers=6), steps=4)
    with pytest.raises(AssertionError, match=r"BadArgument: .*step_000001 does not belong to this model: .*$"):
        run_steps(1, config, root / "rollouts.jsonl", saved.parent, 1, 2)


def test_any_damage_is_noticed(saved, tmp_path):
    """One bit, one cut, one file more or less, of every file: the check names it."""
    from megatron_egrsd.engine import checkpoint

    checkpoint.check(saved)
    generator = random.Random(0)
    files = sorted(p.name for p in saved.iterdir())
    for trial in range(60):
        copy = shutil.copytree(saved, tmp_path / f"step_{trial}")
        file = copy / generator.choice(files)
        content = bytearray(file.read_bytes())
        kind = generator.choice(["flip", "cut", "remove", "add"])
        if kind == "flip":
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            file.write_bytes(content)
        elif kind == "cut":
            file.write_bytes(content[: generator.randrange(len(content))])
        elif kind == "remove":
            file.unlink()
        else:
            (copy / "__9_9.distcp").write_bytes(b"")
        with pytest.raises(BadArgument, match=r"damaged|not a checkpoint"):
            checkpoint.check(copy)
        shutil.rmtree(copy)
    shutil.copytree(saved, copy)
    with open(copy / checkpoint.METRICS_FILE, "a") as history:
        history.write("{}")
    with pytest.raises(BadArgument, match=r"metrics\.jsonl is not what was written"):
        checkpoint.check(copy)
    sums = json.loads((copy / "integrity.json").read_text())
    del sums["files"][checkpoint.METRICS_FILE]  # as older versions wrote it
    (copy / "integrity.json").write_text(json.dumps(sums))
    checkpoint.check(copy)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("dotted", [False, True])
def test_a_checkpoint_cannot_run_code(dotted, saved, tmp_path):
    """Checksums do not protect against their author: `.metadata` may name only records."""
    from megatron_egrsd.engine import checkpoint

    copy = shutil.copytree(saved, tmp_path / "step_1")
    content = pickle.dumps(_Evil(tmp_path / "ran"))
    if dotted:  # os.system, reached through a module of torch's that imports os
        content = (b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c"
                   + bytes([len(f"touch {tmp_path}/ran")]) + f"touch {tmp_path}/ran".encode() + b"\x85R.")  # fmt: skip
    (copy / ".metadata").write_bytes(content)
    sums = json.loads((copy / "integrity.json").read_text())
    sums["files"][".metadata"] = hashlib.sha256(content).hexdigest()
    (copy / "integrity.json").write_text(json.dumps(sums))
    with pytest.raises(BadArgument, match="could run code"):
        checkpoint.check(copy)
    assert not (tmp_path / "ran").exists()


def _resumed_settings(rank, world_size, config, path):
    """Load a checkpoint; return the groups' settings and the learning rates that the remaining updates would have."""
    from megatron_egrsd.engine import checkpoint

    with open_engine(config) as engine:
        step, _ = checkpoint.load(engine, path)
        rates = []
        for _ in range((config.steps - step) * config.optimizer.updates_per_batch):
            rates.append(engine.optimizer.param_groups[0]["lr"])
            engine.scheduler.step(increment=1)
        groups = [{k: g[k] for k in ("betas", "eps", "weight_decay", "wd_mult")} for g in engine.optimizer.param_groups]
    return groups, rates


COSINE = {"schedule": "cosine", "warmup_steps": 0}
KINDS = {"plain": {}, "distributed": {"distributed_optimizer": True}, "bfloat16": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_takes_the_settings_of_the_configuration(kind, tmp_path):
    """Each of these ended in a learning rate of 0 or in megatron-core's "Could not find parameter group"."""
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    parallel = ParallelConfig(max_tokens_per_microbatch=256, **KINDS[kind])
    model = make_qwen3(tmp_path / "model", vocab_size=VOCAB)
    old = training_config(model, steps=2, parallel=parallel, optimizer=OptimizerConfig(lr=1e-3, **COSINE))
    if kind == "bfloat16":
        old = dataclasses.replace(old, model=dataclasses.replace(old.model, dtype=kind))
    run_steps(1, old, tmp_path / "rollouts.jsonl", tmp_path / "run", 0, 2)
    path = tmp_path / "run" / "step_000002"

    longer = dataclasses.replace(old, steps=4)
    ((_, rates),) = run_ranks(_resumed_settings, 1, longer, path)
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * x)) for x in (0.5, 0.75)])

    other = OptimizerConfig(
        lr=1e-4, min_lr=1e-5, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1, updates_per_batch=2, schedule="linear"
    )
    ((groups, rates),) = run_ranks(_resumed_settings, 1, dataclasses.replace(longer, optimizer=other), path)
    assert rates == pytest.approx([1e-4 - 9e-5 * x for x in (4 / 8, 5 / 8, 6 / 8, 7 / 8)])
    for group in groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
        assert group["weight_decay"] == pytest.approx(0.1 * group["wd_mult"])


def test_fewer_updates_a_batch_at_a_resume_never_reach_the_end_of_the_schedule(tmp_path):
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    model = make_qwen3(tmp_path / "model", vocab_size=VOCAB)
    old = training_config(model, steps=4, optimizer=OptimizerConfig(lr=1e-3, updates_per_batch=4, **COSINE))
    run_steps(1, old, tmp_path / "rollouts.jsonl", tmp_path / "run", 0, 1)  # of 4 updates, one has no signal
    new = dataclasses.replace(old, optimizer=dataclasses.replace(old.optimizer, updates_per_batch=1))
    ((_, rates),) = run_ranks(_resumed_settings, 1, new, tmp_path / "run" / "step_000001")
    assert len(rates) == 3 and min(rates) > 1e-4


def _save_with_a_long_name_for_temporary_files(rank, world_size, config, directory):
    import multiprocessing
    import os

    from megatron_egrsd.engine import checkpoint

    os.environ["TMPDIR"] = str(directory / ("x" * 120))
    os.mkdir(os.environ["TMPDIR"])
    with open_engine(config) as engine:
        saved = checkpoint.save(engine, directory, 1, 2, {}).path
    return saved.name, len(multiprocessing.active_children())


def test_a_save_needs_no_other_process(setting):
    """megatron-core's own would fail here: the name of its socket is too long."""
    config, _, root = setting
    assert run_ranks(_save_with_a_long_name_for_temporary_files, 1, config, root) == [("step_000001", 0)]


def _stop_before_the_first_update(rank, world_size, config, path, directory):
    from megatron_egrsd.data.samples import load_rollouts
    from megatron_egrsd.engine import checkpoint
    from tests.training import final_weights, take_steps

    rollouts, results = load_rollouts(path), []
    for start in ("saved", "continued"):
        with open_engine(config) as engine:
            if start == "saved":
                checkpoint.save(engine, directory, 0, 2, {})
            else:
                checkpoint.load(engine, checkpoint.complete(directory)[0])
            metrics, _ = take_steps(engine, rollouts, config, 2)
            results.append((metrics, final_weights(engine)))
    return results if rank == 0 else None


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_that_was_stopped_before_its_first_update_continues(sharded, setting):
    """The optimizer has no moments then. Found by the soak: SIGTERM while the first batch was sampled."""
    config, rollouts, root = setting
    config = dataclasses.replace(config, parallel=ParallelConfig(distributed_optimizer=sharded))
    ((metrics, weights), continued) = run_ranks(_stop_before_the_first_update, 1, config, rollouts, root)[0]
    assert [{k: v for k, v in step.items() if not k.startswith("time/")} for step in continued[0]] == [
        {k: v for k, v in step.items() if not k.startswith("time/")} for step in metrics
    ]
    assert all((continued[1][name] == weight).all() for name, weight in weights.items())
