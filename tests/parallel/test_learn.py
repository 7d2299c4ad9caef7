"""One step of the method on the engine: what trains, what does not, and the schedule of the learning rate."""

import dataclasses
import statistics

import pytest
import torch

from megatron_egrsd.config import OptimizerConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.data.samples import save_rollouts
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.operations import forward_flops, head_flops
from tests.models import make_qwen3
from tests.presets import preset_objective
from tests.ranks import run_ranks
from tests.training import (
    GROUPS,
    PAPER,
    VOCAB,
    assert_same_training,
    made_up_rollouts,
    open_engine,
    run_training,
    training_config,
)


@pytest.fixture
def model(tmp_path):
    return make_qwen3(tmp_path / "model", vocab_size=VOCAB)


def _weights(model):
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("reward", [0.0, 1.0], ids=["all wrong", "all right"])
def test_batch_without_signal_changes_nothing(reward, model, tmp_path):
    rollouts = [dataclasses.replace(r, reward=reward) for r in made_up_rollouts()]
    save_rollouts(rollouts, tmp_path / "rollouts.jsonl")
    config = training_config(model, optimizer=OptimizerConfig(lr=1e-3, updates_per_batch=2))
    metrics, weights = run_training(1, config, tmp_path / "rollouts.jsonl")
    assert all(m["optimizer/updates"] == 0 and m["batch/degenerate_share"] == 1 for m in metrics)
    assert all(torch.equal(weights[k], v) for k, v in _weights(model).items())
    passes = _forward_flops(model, rollouts, "teacher_ids") + _forward_flops(model, rollouts, "student_ids")
    assert [m["perf/model_flops"] for m in metrics] == pytest.approx([passes] * 3)  # two updates need student scores


def test_a_batch_without_signal_trains_under_a_kl_penalty(model, tmp_path):
    save_rollouts([dataclasses.replace(r, reward=0.0) for r in made_up_rollouts()], tmp_path / "rollouts.jsonl")
    config = training_config(model, objective=dataclasses.replace(GROUPS, kl_coef=0.1), steps=2)
    metrics, _ = run_training(1, config, tmp_path / "rollouts.jsonl")
    assert [(m["optimizer/updates"], m["batch/degenerate_share"]) for m in metrics] == [(1, 1)] * 2


def _forward_flops(model, rollouts, prompt):
    arch = Architecture.from_pretrained(model)
    lengths = [len(getattr(r.prompt, prompt)) + len(r.response_ids) for r in rollouts]
    return forward_flops(arch, lengths) + head_flops(arch, sum(len(r.response_ids) for r in rollouts))


def test_under_the_running_advantage_a_batch_that_is_all_wrong_trains(model, tmp_path):
    """And the statistics that a step reports are those of the steps before it."""
    rollouts = [dataclasses.replace(r, reward=0.0) for r in made_up_rollouts()]
    rollouts[0] = dataclasses.replace(rollouts[0], reward=1.0)
    save_rollouts(rollouts, tmp_path / "rollouts.jsonl")
    config = training_config(model, **PAPER)
    metrics, _ = run_training(1, config, tmp_path / "rollouts.jsonl")
    assert all(m["optimizer/updates"] == 1 and m["batch/degenerate_share"] == 0 for m in metrics)
    right = 1 + 0.5 * (1 - len(rollouts[0].response_ids) / 64)
    assert [m["reward/shaped"] for m in metrics] == pytest.approx([right / 16] * 3)
    passes = _forward_flops(model, rollouts, "teacher_ids") + 3 * _forward_flops(model, rollouts, "student_ids")
    assert [m["perf/model_flops"] for m in metrics] == pytest.approx([passes] * 3)  # scored by the teacher, and trained
    assert [m["reward/running_mean"] for m in metrics] == pytest.approx([0, right / 16, right / 16])
    assert [m["reward/running_std"] for m in metrics] == pytest.approx(
        [0, statistics.stdev([right, *[0] * 15]), statistics.stdev([right, *[0] * 15] * 2)]
    )
    assert metrics[0]["accuracy"] == 1 / 16


def test_grpo_runs_no_teacher_and_follows_the_schedule(model, tmp_path):
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-4, schedule="linear", warmup_steps=1)
    config = training_config(model, objective=preset_objective("grpo"), optimizer=optimizer)
    metrics, weights = run_training(1, config, tmp_path / "rollouts.jsonl")
    assert all("teacher/entropy" not in m and m["optimizer/grad_norm"] > 0 for m in metrics)
    # Warm-up starts above zero: half, the peak, then half way down to min_lr.
    assert [m["optimizer/lr"] for m in metrics] == pytest.approx([5e-4, 1e-3, 5.5e-4])
    assert not any(torch.equal(weights[k], v) for k, v in _weights(model).items())


def test_one_update_equals_one_update_scored_beforehand(model, tmp_path):
    """pi_old from the training pass equals pi_old from a pass of its own: the first of two updates uses one policy."""
    rollouts = [r for r in made_up_rollouts() if r.group < 2]
    save_rollouts(rollouts, tmp_path / "two.jsonl")
    base = training_config(model, steps=1)
    one = dataclasses.replace(
        base, rollout=dataclasses.replace(base.rollout, prompts_per_step=2), optimizer=OptimizerConfig(lr=1e-3)
    )
    # The same two groups and two empty ones in a second share, which skips its update but makes the engine score first.
    filler = [dataclasses.replace(r, reward=0.0) for r in made_up_rollouts() if r.group >= 2]
    save_rollouts(rollouts + filler, tmp_path / "four.jsonl")
    normalized = dataclasses.replace(GROUPS, entropy_normalization="sequence_max")  # the batch's would see the fillers
    two = dataclasses.replace(base, optimizer=OptimizerConfig(lr=1e-3, updates_per_batch=2), objective=normalized)
    one = dataclasses.replace(one, objective=normalized)
    got, expected = run_training(1, two, tmp_path / "four.jsonl"), run_training(1, one, tmp_path / "two.jsonl")
    assert got[0][0]["optimizer/grad_norm"] == pytest.approx(expected[0][0]["optimizer/grad_norm"], rel=1e-5)
    for name, weight in expected[1].items():
        assert (got[1][name] - weight).norm() < 1e-5 * weight.norm(), name


def _score_both(rank, world_size, config, path):
    """Score teacher and student in one pass; returns (micro-batches per pass, largest difference to two passes)."""
    from megatron_egrsd.data.packing import Sequence
    from megatron_egrsd.data.samples import load_rollouts
    from megatron_egrsd.learn import score_teacher_and_student

    rollouts = load_rollouts(path)
    teachers = [Sequence(r.prompt.teacher_ids, r.response_ids) for r in rollouts]
    students = [Sequence(r.prompt.student_ids, r.response_ids) for r in rollouts]
    with open_engine(config) as engine:
        passes, run = [], engine.passes.run
        engine.passes.run = lambda batches, *args, **kwargs: (
            passes.append(len(batches)) or run(batches, *args, **kwargs)
        )
        partition = engine.partition([len(t) for t in teachers])
        found = score_teacher_and_student(engine, teachers, students, partition)
        found = found.teacher, found.student
        counts = list(passes)
        expected = engine.score(teachers, partition, "teacher"), engine.score(students, partition)
        worst = max(
            float((getattr(a[i], name) - getattr(b[i], name)).abs().max())
            for a, b in zip(found, expected, strict=True)
            for i in b
            for name in ("log_prob", "entropy")
        )
        return counts, [set(scores) for scores in found] == [set(scores) for scores in expected], worst


@pytest.mark.parametrize(("teacher", "passes"), [("live", 1), ("frozen", 2)])
def test_a_live_teacher_and_the_student_are_scored_in_one_pass(teacher, passes, model, tmp_path):
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    parallel = ParallelConfig(pipeline=2, max_tokens_per_microbatch=256)
    config = training_config(model, parallel=parallel, teacher=TeacherConfig(weights=teacher))
    for counts, same_samples, worst in run_ranks(_score_both, 2, config, tmp_path / "rollouts.jsonl"):
        assert len(counts) == passes and same_samples and worst < 1e-5


def test_a_rank_may_have_nothing_to_train(model, tmp_path):
    """One long response against three short ones: the second rank's last micro-batches are padding alone."""
    rollouts = [r if r.group == 0 else dataclasses.replace(r, reward=0.0) for r in made_up_rollouts()]
    ids = rollouts[0].response_ids * 6
    rollouts[0] = dataclasses.replace(rollouts[0], response_ids=ids, rollout_log_probs=[-1.0] * len(ids))
    save_rollouts(rollouts, tmp_path / "rollouts.jsonl")
    config = training_config(model, parallel=ParallelConfig(max_tokens_per_microbatch=1))
    one, two = (run_training(ranks, config, tmp_path / "rollouts.jsonl") for ranks in (1, 2))
    assert (one[0][0]["batch/micro_batches"], two[0][0]["batch/micro_batches"]) == (4, 3)
    assert_same_training(two, one)
