"""The running statistics of the rewards through the trainer's checkpoints, and the teacher's copies on the engine."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_egrsd.config import DataConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.config.run import CheckpointConfig
from megatron_egrsd.data.samples import load_rollouts, save_rollouts
from megatron_egrsd.objectives.signal import History, shaped_rewards
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import PAPER, VOCAB, made_up_rollouts, open_engine, take_steps, training_config

TOKENIZER = Path(__file__).parents[2] / "examples/tiny/model"
STEPS, LONGEST = 4, 64


@pytest.fixture(scope="module")
def replay(tmp_path_factory) -> Path:
    """A model with a tokenizer, a problem, and four batches of other responses each, in one directory."""
    root = tmp_path_factory.mktemp("replay")
    make_qwen3(root / "model", vocab_size=VOCAB)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, root / "model")
    (root / "problems.jsonl").write_text('{"problem": "p", "answer": "a", "solution": "s"}\n')
    for step in range(1, STEPS + 1):
        save_rollouts(made_up_rollouts(step), root / "rollouts" / f"step_{step:06d}.jsonl")
    return root


def _main(rank, world_size, config, with_rewards=True):
    """Run the trainer; returns the text that it printed. Checkpoints are an older version's without `with_rewards`."""
    from megatron_egrsd.engine import training_state
    from megatron_egrsd.train import main

    sharded = training_state.sharded
    if not with_rewards:
        training_state.sharded = lambda *args, **kwargs: {
            k: v for k, v in sharded(*args, **kwargs).items() if k != "rewards"
        }
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(config)
    return printed.getvalue()


def _configuration(replay: Path, output: Path, stop: int, **changes):
    paper = dataclasses.replace(PAPER["objective"], advantage_warmup=2)
    settings = PAPER | {
        "objective": paper,
        "data": DataConfig(train=str(replay / "problems.jsonl")),
        "checkpoint": CheckpointConfig(every=1, resume="auto"),
        "steps": stop,
        "output": str(output),
        "debug": "train-only",
        "replay": str(replay / "rollouts"),
    }
    return training_config(replay / "model", **settings | changes)


def _metrics(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def _expected(replay: Path, config, stop: int) -> list[History]:
    """The history before each step and after the last one, from the rollouts alone."""
    histories = [History()]
    for step in range(1, stop + 1):
        rollouts = load_rollouts(replay / "rollouts" / f"step_{step:06d}.jsonl")
        histories.append(histories[-1].after(shaped_rewards(rollouts, config.objective, LONGEST)))
    return histories


def test_the_trainer_hands_the_statistics_on_and_a_resumed_one_too(replay, tmp_path):
    """It stops in the middle of the warm-up of two steps, and again after it."""
    whole = _configuration(replay, tmp_path / "whole", STEPS)
    run_ranks(_main, 1, whole)
    for stop in (1, 3, STEPS):
        run_ranks(_main, 1, dataclasses.replace(whole, output=str(tmp_path / "parts"), steps=stop))
    rows = _metrics(tmp_path / "whole")
    assert rows == _metrics(tmp_path / "parts")
    expected = _expected(replay, whole, STEPS)
    assert [(r["reward/running_mean"], r["reward/running_std"]) for r in rows] == [
        (h.mean, h.std) for h in expected[:-1]
    ]
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_update_that_is_skipped_counts_and_the_next_batch_trains(replay, tmp_path):
    for step in (1, 2, 3):
        rollouts = load_rollouts(replay / "rollouts" / f"step_{step:06d}.jsonl")
        if step == 2:
            spoiled = [math.nan, *rollouts[0].rollout_log_probs[1:]]
            rollouts[0] = dataclasses.replace(rollouts[0], rollout_log_probs=spoiled)
        save_rollouts(rollouts, tmp_path / "rollouts" / f"step_{step:06d}.jsonl")
    config = _configuration(replay, tmp_path / "run", 3, max_skipped_steps=1)
    config = dataclasses.replace(config, replay=str(tmp_path / "rollouts"))
    run_ranks(_main, 1, config)
    rows = _metrics(tmp_path / "run")
    assert [(row["optimizer/updates"], row["optimizer/skipped"]) for row in rows] == [(1, 0), (0, 1), (1, 0)]
    expected = _expected(replay, config, 3)
    assert [row["reward/running_mean"] for row in rows] == [history.mean for history in expected[:-1]]
    kept = load_rollouts(tmp_path / "run" / "skipped" / "step_000002.jsonl")
    assert math.isnan(kept[0].rollout_log_probs[0])
    assert kept[1:] == load_rollouts(replay / "rollouts" / "step_000002.jsonl")[1:]
    assert len(list((tmp_path / "run" / "skipped").iterdir())) == 1
    ended = dataclasses.replace(config, output=str(tmp_path / "ended"), max_skipped_steps=0)
    with pytest.raises(AssertionError, match=r"1 in a row are too many.*; resumable: step 2 is saved"):
        run_ranks(_main, 1, ended)
    assert (tmp_path / "ended" / "checkpoints" / "step_000002").is_dir()


def _files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_checkpoint_that_cannot_be_continued_leaves_every_file_where_it_is(replay, tmp_path):
    """A resume that works renames the exported model, which is of the step before."""
    config = _configuration(replay, tmp_path / "run", 1)
    run_ranks(_main, 1, config)
    before = _files(tmp_path / "run")
    assert tmp_path / "run" / "hf" / "config.json" in before
    other = ParallelConfig(max_tokens_per_microbatch=256, distributed_optimizer=True)
    with pytest.raises(AssertionError, match=r"was saved with parallel\.distributed_optimizer false"):
        run_ranks(_main, 1, dataclasses.replace(config, steps=2, parallel=other))
    assert _files(tmp_path / "run") == before


def test_a_checkpoint_without_statistics_starts_them_anew_with_a_warning(replay, tmp_path):
    config = _configuration(replay, tmp_path / "run", 1)
    run_ranks(_main, 1, config, False)
    (printed,) = run_ranks(_main, 1, dataclasses.replace(config, steps=3))
    assert printed.count("warning: it holds no statistics of the rewards; the running advantage warms up anew") == 1
    rows = _metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    second = load_rollouts(replay / "rollouts" / "step_000002.jsonl")
    anew = History().after(shaped_rewards(second, config.objective, LONGEST))
    assert [row["reward/running_mean"] for row in rows] == [0, 0, anew.mean]


def _snapshots(rank, world_size, config, path):
    """Whether the teacher is, bit for bit, the weights that it should be after each step; and its scores' likeness."""
    from megatron_egrsd.data.packing import Sequence

    rollouts, history, found = load_rollouts(path), History(), []
    teachers = [Sequence(r.prompt.teacher_ids, r.response_ids) for r in rollouts]
    with open_engine(config) as engine:
        copies = [[p.detach().clone() for p in engine.parameters()]]
        partition = engine.partition([len(t) for t in teachers])
        for _ in range(5):
            _, history = take_steps(engine, rollouts, config, 1, history)
            copies.append([p.detach().clone() for p in engine.parameters()])
            equal = [
                all(torch.equal(a, b) for a, b in zip(engine.teacher_weights, copy, strict=True)) for copy in copies
            ]
            taught, current = engine.score(teachers, partition, "teacher"), engine.score(teachers, partition)
            alike = all(torch.equal(taught[i].log_prob, current[i].log_prob) for i in current)
            found.append(([s for s, same in enumerate(equal) if same], alike))
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_snapshot_is_the_weights_of_the_step_it_was_copied_at(tensor, replay, tmp_path):
    """Every two steps: copied after the second and the fourth, and the teacher's scores are those of the copy."""
    teacher = TeacherConfig(weights="snapshot", snapshot_every=2)
    parallel = ParallelConfig(tensor=tensor, max_tokens_per_microbatch=256)
    config = training_config(replay / "model", **PAPER | {"teacher": teacher, "parallel": parallel, "steps": 5})
    for found in run_ranks(_snapshots, tensor, config, replay / "rollouts" / "step_000001.jsonl"):
        assert found == [([0], False), ([2], True), ([2], False), ([4], True), ([4], False)]
