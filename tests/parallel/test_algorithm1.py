"""The trainer takes the steps of Algorithm 1, in every layout, from replayed rollouts (arXiv 2605.13255, appendix K).

The other implementation is tests/reference/algorithm1.py. What is compared are metrics.jsonl and output/hf of
`debug: train-only`, as a user gets them.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_egrsd.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts, save_rollouts
from tests.models import make_qwen3
from tests.presets import preset_objective
from tests.ranks import run_ranks
from tests.reference.algorithm1 import Settings, Step, read_rollouts, train

TOKENIZER = Path(__file__).parents[2] / "examples/tiny/model"
VOCAB, STEPS, ROLLOUTS, LONGEST = 61, 3, 8, 48
WINDOWS = {"egrsd": 0, "cl_egrsd": 3}
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "DP2 distributed optimizer": (2, {"distributed_optimizer": True}),
    "CP2": (2, {"context": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return with_tokenizer(make_qwen3(tmp_path_factory.mktemp("algorithm1") / "model", tied=True, vocab_size=VOCAB))


def with_tokenizer(model: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, model)
    return model


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> Path:
    """Three batches of eight rollouts of as many prompts: right, wrong and cut off; responses of 1 to 48 tokens."""
    directory = tmp_path_factory.mktemp("algorithm1") / "rollouts"
    g = torch.Generator().manual_seed(0)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, VOCAB, (length,), generator=g).tolist()

    for step in range(1, STEPS + 1):
        rollouts = []
        for group in range(ROLLOUTS):
            prompt = Prompt(Problem(f"{step}-{group}", "p", "a", "s"), ids(2, 12), ids(12, 30))
            cut = group == 0
            response = ids(LONGEST, LONGEST + 1) if cut else ids(1, LONGEST)
            reward = 0.0 if cut else float((group + step) % 3 > 0)
            log_probs = [-1.0] * len(response)
            rollouts.append(Rollout(prompt, group, response, log_probs, "length" if cut else "stop", 0, "", reward))
        save_rollouts(rollouts, directory / f"step_{step:06d}.jsonl")
    return directory


def configuration(model: Path, batches: Path, output: Path, preset: str, layout: dict, gamma: float) -> Config:
    problems = output.parent / "problems.jsonl"
    problems.write_text('{"problem": "p", "answer": "a", "solution": "s"}\n', encoding="utf-8")
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train=str(problems)),
        objective=preset_objective(preset, attenuation=gamma, advantage_warmup=1),
        rollout=RolloutConfig(
            prompts_per_step=ROLLOUTS, rollouts_per_prompt=1, temperature=1.1, max_response_tokens=LONGEST
        ),
        parallel=ParallelConfig(max_tokens_per_microbatch=128, **layout),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.1, beta1=0.9, beta2=0.999),
        steps=STEPS,
        output=str(output),
        max_log_prob_difference=100.0,  # the rollouts' log-probs are made up
        debug="train-only",
        replay=str(batches),
    )


def _train_on_rank(rank, world_size, config):
    from megatron_egrsd.train import main

    main(config)


@pytest.fixture(scope="module")
def expected(model, batches):
    """Both objectives by the other implementation: (steps, final weights)."""
    paths = sorted(batches.glob("*.jsonl"))
    settings = Settings(gamma=0.8, longest=LONGEST, warmup_steps=1, lr=1e-3, clip_norm=0.1)
    return {
        preset: train(model, [read_rollouts(p) for p in paths], dataclasses.replace(settings, lookahead=window))
        for preset, window in WINDOWS.items()
    }


# In every test run the lookahead through each kind of layout, and EGRSD on one rank.
QUICK = {("cl_egrsd", x) for x in ("TP2 SP", "PP2", "DP2 distributed optimizer", "CP2")} | {("egrsd", "one rank")}


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        pytest.param(preset, layout, marks=() if (preset, layout) in QUICK else pytest.mark.slow)
        for preset in WINDOWS
        for layout in LAYOUTS
    ],
)
def test_three_steps_are_those_of_algorithm_1(preset, layout, model, batches, expected, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    config = configuration(model, batches, tmp_path / "run", preset, parallel, gamma=0.8)
    run_ranks(_train_on_rank, ranks, config)
    assert_same_steps(tmp_path / "run", model, *expected[preset])


def assert_same_steps(run: Path, model: Path, steps: list[Step], weights: dict[str, torch.Tensor]) -> None:
    """Compare a run's metrics with `steps`, and how its weights have moved from `model` with final `weights`."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for got, want in zip(metrics, steps, strict=True):
        assert_same_numbers(got, want, loss=1e-4)
        gates = [g for response in want.gates for g in response]
        assert got["gate/mean"] == pytest.approx(sum(gates) / len(gates), rel=1e-5)
    before, after = load_file(model / "model.safetensors"), load_file(run / "hf" / "model.safetensors")
    assert after.keys() == before.keys()
    assert_same_moves(after, before, weights)


def assert_same_numbers(got: dict[str, float], want: Step, loss: float) -> None:
    """Compare the metrics of a step with `want`, the loss to a relative `loss`."""
    assert got["optimizer/grad_norm"] == pytest.approx(want.grad_norm, rel=1e-5)
    assert got["loss/policy"] == pytest.approx(want.loss, rel=loss, abs=1e-6)
    assert got["reward/shaped"] == pytest.approx(sum(want.rewards) / ROLLOUTS, rel=1e-6)
    every = [abs(w) for response in want.weights for w in response]
    assert got["weight/abs_mean"] == pytest.approx(sum(every) / len(every), rel=1e-5)


def assert_same_moves(after: dict[str, torch.Tensor], before, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor of `after` has moved from `before` as `expected`, to 1e-3 of the way."""
    for name, got in after.items():
        moved = (expected[name] - before[name].double()).norm()
        assert moved > 0, name
        assert (got.double() - expected[name]).norm() < 1e-3 * moved, name


def test_the_two_objectives_and_the_gate_differ_here(expected):
    """Else the comparison above would say little about the lookahead or the gate."""
    egrsd, cl_egrsd = (expected[preset][0] for preset in WINDOWS)
    assert all(abs(a.grad_norm - b.grad_norm) > 1e-3 * a.grad_norm for a, b in zip(egrsd, cl_egrsd, strict=True))
    gates = [g for response in egrsd[0].gates for g in response]
    assert max(gates) - min(gates) > 0.05


EXPERTS, CHOSEN, LAYERS = 6, 2, 2
EXPERT_LAYOUTS = {
    "one rank, recompute": (1, {"recompute": True}),
    "PP2, recompute": (2, {"pipeline": 2, "recompute": True}),
    "TP2 SP EP2": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "CP2, the mixture again": (
        2,
        {"context": 2, "megatron": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    ),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "model"
    return with_tokenizer(make_qwen3(path, tied=False, vocab_size=VOCAB, num_experts=EXPERTS, num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def routed_batches(batches, tmp_path_factory) -> Path:
    """The same batches, every token sent to experts that no router has chosen."""
    g, directory = torch.Generator().manual_seed(1), tmp_path_factory.mktemp("mixture") / "rollouts"
    for path in sorted(batches.glob("*.jsonl")):
        rollouts = []
        for r in load_rollouts(path):
            tokens = len(r.prompt.student_ids) + len(r.response_ids) - 1
            experts = torch.rand(tokens, LAYERS, EXPERTS, generator=g).topk(CHOSEN).indices
            rollouts.append(dataclasses.replace(r, routes=experts.to(torch.uint8).numpy().tobytes()))
        save_rollouts(rollouts, directory / path.name)
    return directory


@pytest.fixture(scope="module")
def expected_of_mixture(mixture, routed_batches):
    settings = Settings(gamma=0.8, longest=LONGEST, warmup_steps=1, lr=1e-3, clip_norm=0.1)
    return train(mixture, [read_rollouts(p) for p in sorted(routed_batches.glob("*.jsonl"))], settings)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=pytest.mark.slow if ranks == 1 else ()) for x, (ranks, _) in EXPERT_LAYOUTS.items()],
)
def test_replayed_routes_are_taken_in_scores_and_in_training(
    layout, mixture, routed_batches, expected_of_mixture, tmp_path
):
    ranks, parallel = EXPERT_LAYOUTS[layout]
    config = configuration(mixture, routed_batches, tmp_path / "run", "cl_egrsd", parallel, gamma=0.8)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, routing_replay=True))
    run_ranks(_train_on_rank, ranks, config)
    assert_same_steps(tmp_path / "run", mixture, *expected_of_mixture)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        # Two of six at random are the router's own two in one case of fifteen.
        assert json.loads(line)["sync/routing_changed"] == pytest.approx(14 / 15, abs=0.05)
