"""RLCSD trains as another implementation does, in every layout: several contexts of the teacher for each response.

That one is tests/reference/rlcsd.py: Hugging Face, PEFT and fp64.
"""

import json

import numpy as np
import pytest
import torch

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, save_rollouts
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.operations import forward_flops, head_flops
from megatron_egrsd.report.scored_dump import load_scores
from megatron_egrsd.report.token_page import render
from tests.parallel.test_algorithm1 import STEPS, VOCAB, model  # noqa: F401 (a fixture)
from tests.parallel.test_algorithm1 import _train_on_rank as train_on_rank
from tests.parallel.test_distillation import LAYOUTS, SETTINGS, assert_adapter, assert_model
from tests.parallel.test_lora import adapter  # noqa: F401 (a fixture)
from tests.ranks import run_ranks
from tests.reference.algorithm1 import read_rollouts
from tests.reference.rlcsd import advantages, train

TAU = 1.0  # contexts of random tokens move this model by more than the default 0.02, which would hide the contrast
RLCSD = ["--objective.preset", "rlcsd", "--objective.options.tau", str(TAU), "--teacher.snapshot_every", "2"]
WORDS = [
    *("--rollout.prompts_per_step", "4", "--rollout.rollouts_per_prompt", "4"),
    *("--rollout.temperature", str(SETTINGS["temperature"]), "--rollout.max_response_tokens", "48"),
    *("--optimizer.lr", str(SETTINGS["lr"]), "--optimizer.eps", str(SETTINGS["adam_epsilon"])),
    *("--optimizer.beta1", "0.9", "--optimizer.beta2", "0.999", "--optimizer.weight_decay", "0"),
    *("--optimizer.clip_grad", str(SETTINGS["clip_norm"]), "--optimizer.warmup_steps", "0"),
    *("--parallel.max_tokens_per_microbatch", "128", "--model.dtype", "float32"),
    *("--debug", "train-only", "--max_log_prob_difference", "100", "--dump_scores", "true"),
]


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Three batches of four groups of four; the last group is all wrong. In the second, one rollout has contexts."""
    directory = tmp_path_factory.mktemp("rlcsd") / "rollouts"
    g = torch.Generator().manual_seed(0)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, VOCAB, (length,), generator=g).tolist()

    for step in range(1, STEPS + 1):
        rollouts = []
        for group in range(4):
            prompt = Prompt(Problem(f"{step}-{group}", "p", "a", ""), ids(2, 12), [])
            for k in range(4):
                # A right one, and one to four wrong ones; none for the third rollout of the second group.
                some = (group, k) == (0, 0) if step == 2 else (group, k) != (1, 2)
                contexts = [ids(12, 30) for _ in range(2 + (group + k) % 4)] if some else []
                response, reward = ids(1, 48), float((k + group) % 2 if group < 3 else 0)
                log_probs = (-torch.rand(len(response), generator=g) * 4).tolist()
                rollouts.append(Rollout(prompt, group, response, log_probs, "stop", 0, "", reward, contexts=contexts))
        save_rollouts(rollouts, directory / f"step_{step:06d}.jsonl")
    return directory


@pytest.fixture(scope="module")
def expected(model, batches, adapter):  # noqa: F811
    """Three steps by the other implementation, of all weights and of an adapter; the third has a new teacher."""
    read = [read_rollouts(p) for p in sorted(batches.glob("*.jsonl"))]
    return {a: train(model, read, **SETTINGS, tau=TAU, refresh=2, adapter=a) for a in (None, adapter)}


def run(model, batches, output, ranks, parallel, *words, objective=RLCSD):  # noqa: F811
    problems = output.parent / "problems.jsonl"
    problems.write_text('{"problem": "p", "answer": "a"}\n', encoding="utf-8")
    files = ["--model.path", model, "--data.train", problems, "--replay", batches, "--output", output]
    words = [*objective, *WORDS, *words, *files]
    layout = [word for key, value in parallel.items() for word in (f"--parallel.{key}", str(value).lower())]
    run_ranks(train_on_rank, ranks, parse_config(["--steps", str(STEPS), *map(str, words), *layout]))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_steps(metrics, steps):
    for got, (loss, grad_norm, share) in zip(metrics, steps, strict=True):
        assert got["loss/policy"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert got["optimizer/grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
        assert got["contrast/selected_share"] == pytest.approx(share, rel=1e-6)


def _flops(model, path) -> float:  # noqa: F811
    """The teacher scores a response after each of its contexts, after the student's prompt if it has none."""
    arch, flops, read = Architecture.from_pretrained(model), 0.0, read_rollouts(path)
    for rollout, advantage in zip(read, advantages(read), strict=True):
        prompt, response = rollout["prompt"]["student_ids"], len(rollout["response_ids"])
        trained = [prompt] * 3 if advantage else []  # forward, and backward at twice the cost
        for before in (rollout["contexts"] or [prompt]) + trained:
            flops += forward_flops(arch, [len(before) + response]) + head_flops(arch, response)
    return flops


def assert_run(output, metrics, model, expected):  # noqa: F811
    steps, weights = expected[None]
    assert_steps(metrics, steps)
    assert_model(output, model, weights)


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow if x in ("PP2", "DP2") else ()) for x in LAYOUTS]
)
def test_three_steps(layout, model, batches, expected, tmp_path):  # noqa: F811
    metrics = run(model, batches, tmp_path / "run", *LAYOUTS[layout])
    assert_run(tmp_path / "run", metrics, model, expected)
    for number, path in enumerate(sorted(batches.glob("*.jsonl")), 1):
        scored = load_scores(tmp_path / "run" / "scores" / f"step_{number:06d}.jsonl")
        assert [r.advantage for r in scored] == pytest.approx(advantages(read_rollouts(path)), rel=1e-5)
        every = np.concatenate([np.abs(r.weight) for r in scored if r.advantage])
        assert every.mean() == pytest.approx(metrics[number - 1]["weight/abs_mean"], rel=1e-4)
        assert metrics[number - 1]["perf/model_flops"] == pytest.approx(_flops(model, path))


def test_a_stopped_run_continues_and_its_dumps_have_a_page(model, batches, expected, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    run(model, batches, output, 1, {}, "--steps", "1", "--checkpoint.every", "1")
    metrics = run(model, batches, output, 1, {}, "--checkpoint.resume", "auto")
    assert_run(output, metrics, model, expected)
    assert "RLCSD (this run)" in render(load_scores(output / "scores" / "step_000003.jsonl"), "run")


@pytest.mark.parametrize("layout", ["TP2 SP", pytest.param("CP2", marks=pytest.mark.slow)])
def test_three_steps_with_adapters(layout, model, batches, adapter, expected, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    metrics = run(model, batches, output, *LAYOUTS[layout], "--lora.init", str(adapter), "--lora.export", "adapter")
    steps, tensors = expected[adapter]
    assert_steps(metrics, steps)
    assert_adapter(output, adapter, tensors)


def test_the_contrast_matters_here(expected):
    """Else the comparison above would say little about it: some tokens are selected and others are not."""
    assert all(0.5 < share < 1 for _, _, share in expected[None][0])
