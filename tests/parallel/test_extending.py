"""Users' objectives on the engine: the same in every layout, recorded as trained, from the command line."""

import os

import numpy as np
import pytest

from megatron_egrsd import cli
from megatron_egrsd.config import ObjectiveConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, save_rollouts
from megatron_egrsd.report.scored_dump import load_scores
from megatron_egrsd.report.token_page import page_data
from tests.command_line import run_command
from tests.models import make_qwen3
from tests.parallel.test_scores import step
from tests.ranks import run_ranks
from tests.training import VOCAB, assert_same_training, made_up_rollouts, run_training, training_config
from tests.unit.test_extending import EXAMPLES, HIGH_ENTROPY, OPSD, ROOT

DISTIL_WRONG = f"{EXAMPLES / 'distil_wrong.py'}:DistilWrong"
SPLIT = {"max_tokens_per_microbatch": 64}
OBJECTIVES = {
    "OPSD": ({"objective": ObjectiveConfig(function=OPSD)}, 2, {}),
    "OPSD, two updates": (
        {"objective": ObjectiveConfig(function=OPSD), "optimizer": OptimizerConfig(lr=1e-3, updates_per_batch=2)},
        2,
        {"pipeline": 2},
    ),
    # A policy loss and a divergence, from a teacher whose LM head changes between the updates.
    "distil wrong, two updates": (
        {
            "objective": ObjectiveConfig(function=DISTIL_WRONG, importance_cap=2.0),
            "teacher": TeacherConfig(weights="ema", ema_decay=0.5),
            "optimizer": OptimizerConfig(lr=1e-4, updates_per_batch=2),
        },
        2,
        {"tensor": 2},
    ),
    # Its threshold spans the data-parallel ranks.
    "high entropy": ({"objective": ObjectiveConfig(function=HIGH_ENTROPY, options={"share": 0.5})}, 2, {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("extending")
    save_rollouts(made_up_rollouts(), root / "rollouts.jsonl")
    return make_qwen3(root / "model", vocab_size=VOCAB), root


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "OPSD" else ()) for n in OBJECTIVES])
def test_layout_does_not_change_training(name, files):
    (changes, ranks, layout), (model, root) = OBJECTIVES[name], files
    expected = run_training(1, training_config(model, **changes), root / "rollouts.jsonl")
    split = training_config(model, parallel=ParallelConfig(**SPLIT, **layout), **changes)
    assert_same_training(run_training(ranks, split, root / "rollouts.jsonl"), expected)
    assert expected[0][0]["optimizer/grad_norm"] > 0
    assert ("teacher/entropy" in expected[0][0]) == (name != "high entropy")


# A token weighs as much as the other tokens of its rollout are uncertain.
WHOLE = """
import torch
from megatron_egrsd.objectives import Objective

class Whole(Objective):
    needs_teacher = False

    def weight(self, tokens):
        lengths = tokens.cu_seqlens.diff()
        means = torch.stack([h.mean() for h in tokens.student_entropy.split(lengths.tolist())])
        return tokens.advantage * means.repeat_interleave(lengths)
"""


@pytest.mark.slow
def test_context_parallelism_shows_an_objective_whole_rollouts(files):
    model, root = files
    (root / "whole.py").write_text(WHOLE)
    objective = ObjectiveConfig(function=f"{root / 'whole.py'}:Whole")
    expected = run_training(1, training_config(model, objective=objective), root / "rollouts.jsonl")
    split = ParallelConfig(context=2, **SPLIT)
    assert_same_training(
        run_training(2, training_config(model, objective=objective, parallel=split), root / "rollouts.jsonl"), expected
    )
    assert expected[0][0]["optimizer/grad_norm"] > 0


def test_the_record_is_what_is_trained_and_needs_no_reward(files):
    path = files[1] / "opsd.jsonl"
    config = {"objective": ObjectiveConfig(function=OPSD), "optimizer": OptimizerConfig(lr=1e-12)}
    metrics = step(files, path, **config)
    scored = load_scores(path)
    assert metrics["batch/degenerate_share"] == 0 and all(r.advantage == 1 for r in scored)
    # Over all rollouts, including the group without a right response.
    weight, ratio = (
        np.concatenate(x)
        for x in zip(*((r.weight, r.teacher_log_prob - r.student_log_prob) for r in scored), strict=True)
    )
    assert np.abs(weight).mean() == pytest.approx(metrics["weight/abs_mean"], rel=1e-4)
    assert ratio.mean() == pytest.approx(metrics["weight/log_ratio"], rel=1e-4)
    assert metrics["opsd/clip_share"] == pytest.approx((np.abs(ratio) > 5).mean()) and metrics["opsd/clip_share"] > 0


def test_the_record_holds_what_the_divergence_adds(files):
    path = files[1] / "distil_wrong.jsonl"
    config = {"objective": ObjectiveConfig(function=DISTIL_WRONG), "optimizer": OptimizerConfig(lr=1e-12)}
    metrics, scored = step(files, path, **config), load_scores(path)
    added = np.concatenate([r.divergence for r in scored])
    assert added.mean() == pytest.approx(metrics["wrong/divergence"], rel=1e-4) and added.mean() > 0
    assert all((r.divergence == 0).all() == (r.advantage > 0) for r in scored)


def _replay(path):
    """Rollouts of the tiny model's task, as `dump_rollouts` writes them: two prompts, two responses each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny/model")
    rollouts = []
    for group in range(2):
        problem = Problem(str(group), f"{group}+1-1=?", str(group), f"{group}+1={group + 1};{group + 1}-1={group}")
        prompt = Prompt(
            problem, tokenizer.encode(problem.problem), tokenizer.encode(problem.problem + problem.solution)
        )
        for answer in (group, group + 1):
            ids = tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)
            rollouts.append(Rollout(prompt, group, ids, [-1.0] * len(ids), "stop", 0, "", float(answer == group)))
    save_rollouts(rollouts, path)


def _train_by_command(rank, world_size, words):
    os.chdir(ROOT)
    assert cli.main(["train", *words]) == 0


def test_one_file_from_the_command_line_to_the_token_page(tmp_path):
    """With only the example's file: train on dumped rollouts, without SGLang, then write the page of the dump."""
    _replay(tmp_path / "rollouts.jsonl")
    train = ["--config", "examples/configs/tiny_cpu.yaml", "--objective.function", OPSD.replace(f"{ROOT}/", "")]
    train += ["--objective.options.clip", "2", "--dump_scores", "true", "--steps", "1", "--output", f"{tmp_path}/run"]
    train += ["--debug", "train-only", "--replay", f"{tmp_path}/rollouts.jsonl", "--max_log_prob_difference", "100"]
    train += ["--rollout.prompts_per_step", "2", "--rollout.rollouts_per_prompt", "2"]
    run_ranks(_train_by_command, 1, train)
    assert run_command("report", "--tokens", tmp_path / "run").returncode == 0
    scored = load_scores(tmp_path / "run" / "scores" / "step_000001.jsonl")
    for r in scored:
        assert r.weight == pytest.approx(np.clip(r.teacher_log_prob - r.student_log_prob, -2, 2), abs=1e-6)
    assert page_data(scored, [0, 1])["trained"] == "run"
    assert "OPSD (this run)" in (tmp_path / "run" / "tokens_step_000001.html").read_text()
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
