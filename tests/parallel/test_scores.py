"""`learn` records the values that it trains with, and the same in every layout."""

import dataclasses

import numpy as np
import pytest

from megatron_egrsd.config import OptimizerConfig, ParallelConfig
from megatron_egrsd.data.samples import load_rollouts, save_rollouts
from megatron_egrsd.report.scored_dump import gather_scores, load_scores, save_scores, scored_rollouts
from tests.models import make_qwen3
from tests.presets import preset_objective
from tests.ranks import run_ranks
from tests.training import PAPER, VOCAB, made_up_rollouts, open_engine, training_config
from tests.unit.test_scores import HISTORY, TOKENIZER


def _step(rank, world_size, config, rollouts, output):
    """Take one step and return its metrics; the scores go to `output` unless it is None."""
    from megatron_egrsd.learn import learn

    rollouts = load_rollouts(rollouts)

    def record(rewards, advantage, student, teacher):
        student, teacher = gather_scores(engine, student), gather_scores(engine, teacher)
        assert (student is not None) == (rank == 0)
        if rank == 0:
            batch = rollouts, rewards, advantage, student, teacher, config.objective, TOKENIZER
            save_scores(scored_rollouts(*batch, step=3, vocab_size=VOCAB, history=HISTORY), output)

    with open_engine(config) as engine:
        return learn(engine, rollouts, config, record if output else None, HISTORY)[0]


LAYOUTS = {
    "DP2": (2, {}),
    "PP2": (2, {"pipeline": 2}),
    "TP2 DP2": (4, {"tensor": 2}),
    "CP2 DP2": (4, {"context": 2}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    save_rollouts(made_up_rollouts(), root / "rollouts.jsonl")
    return make_qwen3(root / "model", vocab_size=VOCAB), root


def step(files, output, world_size=1, **changes):
    model, root = files
    config = training_config(model, **{"steps": 1, **changes})
    return run_ranks(_step, world_size, config, root / "rollouts.jsonl", output)[0]


def dump(files, name, world_size=1, **changes):
    path = files[1] / f"{name}.jsonl"
    step(files, path, world_size, **changes)
    return load_scores(path)


@pytest.fixture(scope="module")
def reference(files):
    return dump(files, "reference")


@pytest.mark.parametrize("layout", [pytest.param(x, marks=pytest.mark.slow if "CP" in x else ()) for x in LAYOUTS])
def test_every_layout_records_the_same(layout, files, reference):
    world_size, parallel = LAYOUTS[layout]
    parallel = ParallelConfig(max_tokens_per_microbatch=256, **parallel)
    scored = dump(files, layout, world_size, parallel=parallel)
    assert len(scored) == 16
    for a, b in zip(scored, reference, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, np.ndarray):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=field.name)
            else:
                assert x == (pytest.approx(y, rel=1e-5) if field.name == "entropy_scale" else y), field.name


@pytest.mark.parametrize("updates", [1, 2])
def test_the_record_is_what_is_trained(updates, files):
    """Means over the trained tokens of the dump are the step's metrics, which recording does not change."""
    optimizer, path = OptimizerConfig(lr=1e-12, updates_per_batch=updates), files[1] / f"updates-{updates}.jsonl"
    recorded, plain = (step(files, output, optimizer=optimizer) for output in (path, None))
    scored = load_scores(path)
    assert set(recorded) == set(plain)
    assert all(recorded[k] == pytest.approx(plain[k], rel=1e-6) for k in plain if not k.startswith("time/"))
    trained = [r for r in scored if r.advantage]
    assert {r.group for r in scored} - {r.group for r in trained} == {3}  # without advantage, and scored all the same
    assert all(np.isfinite(r.student_log_prob).all() and np.isfinite(r.teacher_entropy).all() for r in scored)
    columns = {
        "weight/abs_mean": lambda r: np.abs(r.weight),
        "gate/mean": lambda r: r.gate,
        "student/entropy": lambda r: r.student_entropy,
        "teacher/entropy": lambda r: r.teacher_entropy,
        "weight/log_ratio": lambda r: r.teacher_log_prob - r.student_log_prob,
        "sync/log_prob_difference": lambda r: np.abs(r.student_log_prob - r.rollout_log_prob),
    }
    for name, column in columns.items():
        assert np.concatenate([column(r) for r in trained]).mean() == pytest.approx(plain[name], rel=1e-4), name


def test_the_running_advantage_is_that_of_the_recorded_history(files):
    scored = dump(files, "paper", **PAPER)
    assert all(r.history == HISTORY for r in scored)
    assert any(r.shaped_reward > 1 for r in scored) and {r.shaped_reward for r in scored if not r.reward} == {0.0}
    for r in scored:
        assert r.advantage == pytest.approx((r.shaped_reward - HISTORY.mean) / (HISTORY.std + 1e-6), rel=1e-6)


def test_grpo_records_without_a_teacher(files):
    scored = dump(files, "grpo", objective=preset_objective("grpo"))
    assert all(r.teacher_log_prob is None and (r.weight == np.float32(r.advantage)).all() for r in scored)
