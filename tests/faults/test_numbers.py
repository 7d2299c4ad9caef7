"""Numbers that go bad skip the update, on all ranks together, and leave the weights as they were."""

import dataclasses
import math

import pytest
import torch

from megatron_egrsd.config import OptimizerConfig, ParallelConfig
from megatron_egrsd.data.samples import load_rollouts, save_rollouts
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import PAPER, VOCAB, made_up_rollouts, open_engine, training_config

LAYOUTS = {
    "TP1": (1, ParallelConfig(max_tokens_per_microbatch=256)),
    "DP2 distributed optimizer": (2, ParallelConfig(max_tokens_per_microbatch=256, distributed_optimizer=True)),
    "PP2": (2, ParallelConfig(max_tokens_per_microbatch=256, pipeline=2)),
}
QUICK = {("log_prob", "TP1"), ("gradient", "DP2 distributed optimizer"), ("disagreement", "PP2")}


def _spoiled(kind: str):
    """Return a batch, with one bad number in it if `kind` is "log_prob"; the other kinds spoil the engine."""
    rollouts = made_up_rollouts()
    if kind == "log_prob":
        r = rollouts[0]
        values = [math.nan, *r.rollout_log_probs[1:]]
        rollouts[0] = dataclasses.replace(r, rollout_log_probs=values)
    return rollouts


def _train(rank, world_size, config, path, kind):
    from megatron_egrsd.learn import learn

    good, bad = load_rollouts(path / "good.jsonl"), load_rollouts(path / "bad.jsonl")
    with open_engine(config) as engine:
        hook = None
        if kind == "gradient":  # the result of an overflow in one rank's backward pass
            first = next(p for p in engine.parameters() if p.requires_grad)
            value = math.inf if rank == world_size - 1 else 1.0
            hook = first.register_hook(lambda grad: grad * value)
        before = _weights(engine)
        strict = dataclasses.replace(config, max_log_prob_difference=1e-3) if kind == "disagreement" else config
        skipped, _ = learn(engine, bad, strict)
        unchanged = all(torch.equal(a, b) for a, b in zip(before, _weights(engine), strict=True))
        if hook:
            hook.remove()
        after, _ = learn(engine, good, config)
        changed = not all(torch.equal(a, b) for a, b in zip(before, _weights(engine), strict=True))
        return skipped, unchanged, after, changed


def _weights(engine) -> list[torch.Tensor]:
    return [tensor.clone() for _, tensor in engine.export_weights()] or [torch.zeros(1), torch.ones(1)]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(kind, layout, marks=() if (kind, layout) in QUICK else pytest.mark.slow)
        for kind in ("log_prob", "gradient", "disagreement")
        for layout in LAYOUTS
    ],
)
def test_a_bad_number_skips_the_update_on_all_ranks(kind, layout, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    save_rollouts(made_up_rollouts(), tmp_path / "good.jsonl")
    save_rollouts(_spoiled(kind), tmp_path / "bad.jsonl")
    config = training_config(make_qwen3(tmp_path / "model", vocab_size=VOCAB), parallel=parallel)
    results = run_ranks(_train, world_size, config, tmp_path, kind)
    skipped, unchanged, after, changed = results[0]
    assert unchanged and skipped["optimizer/updates"] == 0 and skipped[f"skipped/{kind}"] == 1
    assert "optimizer/grad_norm" not in skipped and "loss/policy" not in skipped
    # The run goes on from whole weights: the next batch trains.
    assert changed and after["optimizer/updates"] == 1 and after["optimizer/skipped"] == 0
    assert math.isfinite(after["optimizer/grad_norm"]) and math.isfinite(after["loss/policy"])
    for other in results[1:]:  # every rank decided alike
        assert other[0]["optimizer/skipped"] == 1 and other[2]["optimizer/updates"] == 1


def _train_both(rank, world_size, config, path):
    from megatron_egrsd.learn import learn

    results = []
    for name in ("bad", "half"):
        with open_engine(config) as engine:
            results.append(learn(engine, load_rollouts(path / f"{name}.jsonl"), config)[0])
    return results


def test_a_skipped_update_leaves_the_metrics_of_the_one_before_it(tmp_path):
    """The step is that of a batch whose second half has nothing to train."""
    rollouts = made_up_rollouts()
    half = [r if r.group < 2 else dataclasses.replace(r, reward=0.0) for r in rollouts]
    last = next(i for i, r in enumerate(rollouts) if r.group == 2)
    nan = [math.nan] * len(rollouts[last].response_ids)
    rollouts[last] = dataclasses.replace(rollouts[last], rollout_log_probs=nan)
    save_rollouts(rollouts, tmp_path / "bad.jsonl")
    save_rollouts(half, tmp_path / "half.jsonl")
    optimizer = OptimizerConfig(lr=1e-3, updates_per_batch=2)
    config = training_config(make_qwen3(tmp_path / "model", vocab_size=VOCAB), optimizer=optimizer)
    bad, expected = run_ranks(_train_both, 1, config, tmp_path)[0]
    assert (bad["optimizer/updates"], bad["optimizer/skipped"], expected["optimizer/skipped"]) == (1, 1, 0)
    assert bad["optimizer/lr"] > 0
    for name in ("optimizer/lr", "optimizer/grad_norm", "loss/policy", "batch/micro_batches"):
        assert bad[name] == pytest.approx(expected[name]), name


def _poisoned(rank, world_size, config, path):
    from megatron_egrsd.learn import learn

    with open_engine(config) as engine:
        with torch.no_grad():
            next(engine.parameters()).fill_(math.nan)
        return learn(engine, load_rollouts(path / "good.jsonl"), config)[0]


@pytest.mark.parametrize("normalization", ["batch_max", "quantile"])
def test_a_model_of_nans_skips_every_update(normalization, tmp_path):
    """Teacher, gate, maximum and quantile of only nan must not raise before the check of the update."""
    save_rollouts(made_up_rollouts(), tmp_path / "good.jsonl")
    objective = dataclasses.replace(PAPER["objective"], entropy_normalization=normalization)
    config = training_config(make_qwen3(tmp_path / "model", vocab_size=VOCAB), objective=objective)
    metrics = run_ranks(_poisoned, 1, config, tmp_path)[0]
    assert metrics["optimizer/skipped"] == 1 and metrics["optimizer/updates"] == 0
