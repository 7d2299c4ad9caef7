"""SFT trains reference solutions as Hugging Face and PEFT do, in every layout, and starts no server."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import load_rollouts
from megatron_egrsd.report.scored_dump import load_scores
from megatron_egrsd.report.token_page import render
from tests.parallel.test_algorithm1 import STEPS, TOKENIZER, model  # noqa: F401 (a fixture)
from tests.parallel.test_algorithm1 import _train_on_rank as train_on_rank
from tests.parallel.test_distillation import LAYOUTS, SETTINGS, assert_adapter, assert_model
from tests.parallel.test_lora import adapter  # noqa: F401 (a fixture)
from tests.ranks import run_ranks
from tests.reference.algorithm1 import final_weights, load_student, trained, update

ROWS = [json.loads(line) for line in (TOKENIZER.parent / "train.jsonl").read_text().splitlines()[:8]]
WORDS = [  # sampling's temperature must not matter
    *("--objective.preset", "sft", "--rollout.prompts_per_step", str(len(ROWS)), "--rollout.temperature", "0.7"),
    *("--rollout.max_response_tokens", "120", "--steps", str(STEPS), "--model.dtype", "float32"),
    *("--optimizer.lr", str(SETTINGS["lr"]), "--optimizer.eps", str(SETTINGS["adam_epsilon"])),
    *("--optimizer.beta1", "0.9", "--optimizer.beta2", "0.999", "--optimizer.weight_decay", "0"),
    *("--optimizer.clip_grad", str(SETTINGS["clip_norm"]), "--optimizer.warmup_steps", "0"),
    *("--parallel.max_tokens_per_microbatch", "128"),
]


def reference(model, adapter=None):  # noqa: F811
    """Take the steps on all rows each; (loss, gradient norm) of each step, and the final weights or the adapter's."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    network = load_student(model, adapter)
    optimizer = torch.optim.AdamW(trained(network), lr=SETTINGS["lr"], eps=SETTINGS["adam_epsilon"], weight_decay=0.0)
    rows = []
    for row in ROWS:
        user, said = {"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["solution"]}
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([user, said], tokenize=False).rstrip("\n")
        ids = torch.tensor([tokenizer.encode(whole, add_special_tokens=False)])
        rows.append((ids, len(tokenizer.encode(prompt, add_special_tokens=False))))
    steps, count = [], sum(ids.shape[1] - start for ids, start in rows)
    for _ in range(STEPS):
        loss = sum(
            torch.nn.functional.cross_entropy(network(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum")
            for ids, start in rows
        )
        steps.append(update(network, optimizer, loss / count, SETTINGS["clip_norm"]))
    return steps, final_weights(network)


@pytest.fixture(scope="module")
def expected(model, adapter):  # noqa: F811
    return {name: reference(model, name) for name in (None, adapter)}


def run(model, output, ranks, parallel, *words):  # noqa: F811
    problems = output.parent / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    paths = ["--model.path", str(model), "--data.train", str(problems), "--output", str(output)]
    layout = [word for key, value in parallel.items() for word in (f"--parallel.{key}", str(value).lower())]
    run_ranks(train_on_rank, ranks, parse_config([*WORDS, *paths, *layout, *words]))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_steps(metrics, steps):
    assert not (any(m["sync/log_prob_difference"] for m in metrics) or any(m["batch/sampled"] for m in metrics))
    for got, (loss, grad_norm) in zip(metrics, steps, strict=True):
        assert got["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert got["optimizer/grad_norm"] == pytest.approx(grad_norm, rel=1e-5)


def assert_run(output, metrics, model, expected):  # noqa: F811
    steps, weights = expected[None]
    assert_steps(metrics, steps)
    assert_model(output, model, weights)


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow if x in ("PP2", "DP2") else ()) for x in LAYOUTS]
)
def test_three_steps(layout, model, expected, tmp_path):  # noqa: F811
    metrics = run(model, tmp_path / "run", *LAYOUTS[layout])
    assert_run(tmp_path / "run", metrics, model, expected)
    assert not (tmp_path / "run" / "logs").exists()  # of a server


def test_a_stopped_run_continues_and_its_dumps_are_replayed(model, expected, tmp_path):  # noqa: F811
    output, dumps = tmp_path / "run", ("--dump_rollouts", "true", "--dump_scores", "true")
    run(model, output, 1, {}, "--steps", "1", "--checkpoint.every", "1", *dumps)
    assert_run(output, run(model, output, 1, {}, "--checkpoint.resume", "auto", *dumps), model, expected)
    scored = load_scores(output / "scores" / "step_000003.jsonl")
    assert "SFT (this run)" in render(scored, "run") and all((r.weight == 1).all() for r in scored)
    for step in range(1, STEPS + 1):  # every problem once a step, in an order of its own
        rollouts = load_rollouts(output / "rollouts" / f"step_{step:06d}.jsonl")
        assert sorted(r.text for r in rollouts) == sorted(row["solution"] for row in ROWS)
    replayed = run(model, tmp_path / "replay", 1, {}, "--debug", "train-only", "--replay", str(output / "rollouts"))
    for got, (loss, _) in zip(replayed, expected[None][0], strict=True):
        assert got["loss/policy"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("layout", ["TP2 SP", pytest.param("CP2", marks=pytest.mark.slow)])
def test_three_steps_with_adapters(layout, model, adapter, expected, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    metrics = run(model, output, *LAYOUTS[layout], "--lora.init", str(adapter), "--lora.export", "adapter")
    steps, tensors = expected[adapter]
    assert_steps(metrics, steps)
    assert_adapter(output, adapter, tensors)
