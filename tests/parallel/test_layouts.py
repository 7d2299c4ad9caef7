"""The layout is no hyper-parameter: TP, PP, VPP, SP, CP, DP, EP, packing and micro-batch size train alike.

Weights and adapters.
"""

import dataclasses

import pytest
from safetensors.torch import load_file

from megatron_egrsd.config import LoraConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.data.samples import save_rollouts
from tests.models import make_model, make_qwen3
from tests.training import GROUPS, PAPER, VOCAB, assert_same_training, made_up_rollouts, run_training, training_config


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    save_rollouts(made_up_rollouts(), root / "rollouts.jsonl")
    return {tied: make_qwen3(root / f"tied-{tied}", tied=tied, vocab_size=VOCAB) for tied in (True, False)}, (
        root / "rollouts.jsonl"
    )


@pytest.fixture(scope="module")
def reference(paths):
    models, rollouts = paths
    return {tied: run_training(1, training_config(models[tied], **METHOD[tied]), rollouts) for tied in (True, False)}


METHOD = {True: {}, False: PAPER}  # by tied embeddings: groups with a live teacher, the running advantage with a frozen
LAYOUTS = {
    "TP2": (2, {"tensor": 2}, True),
    "PP2": (2, {"pipeline": 2}, True),
    "PP2, 3 layers and 1": (2, {"pipeline": 2, "pipeline_layout": [3, 1]}, True),
    "PP2 untied": (2, {"pipeline": 2}, False),
    "DP2": (2, {}, False),
    "DP2 distributed optimizer": (2, {"distributed_optimizer": True}, True),
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True}, False),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}, True),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True}, True),
    "one sample a micro-batch": (1, {"max_tokens_per_microbatch": 1}, False),
    "DP2, ranks with padding alone": (2, {"max_tokens_per_microbatch": 1}, True),
    "one micro-batch": (1, {"max_tokens_per_microbatch": 100_000}, True),
    "recompute": (1, {"recompute": True}, True),
    "DP2, reduction overlaps": (2, {"overlap_grad_reduce": True, "distributed_optimizer": True}, False),
    "recompute the MLP": (1, {"megatron": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}}, True),
}
CONTEXT_LAYOUTS = {
    "CP2 distributed optimizer": (2, {"context": 2, "distributed_optimizer": True}, True),
    "CP2 TP2 SP": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}, False),
    "CP2 TP2": (4, {"context": 2, "tensor": 2}, True),
    "CP2 PP2": (4, {"context": 2, "pipeline": 2, "recompute": True}, False),
    "CP2 PP2 VPP2": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True}, True),
    "CP2 DP2": (4, {"context": 2, "distributed_optimizer": True, "overlap_grad_reduce": True}, True),
    "CP2 DP2, ranks with padding alone": (4, {"context": 2, "max_tokens_per_microbatch": 1}, False),
    "CP4": (4, {"context": 4}, True),
}
LAYOUTS |= {name: (n, {"max_tokens_per_microbatch": 64} | p, tied) for name, (n, p, tied) in CONTEXT_LAYOUTS.items()}
SLOW = [name for name, (ranks, _, _) in CONTEXT_LAYOUTS.items() if ranks > 2]


@pytest.mark.parametrize("layout", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in LAYOUTS])
def test_layout_does_not_change_training(layout, paths, reference):
    world_size, parallel, tied = LAYOUTS[layout]
    models, rollouts = paths
    parallel = ParallelConfig(**{"max_tokens_per_microbatch": 256, **parallel})
    config = training_config(models[tied], parallel=parallel, **METHOD[tied])
    assert_same_training(run_training(world_size, config, rollouts), reference[tied])


EXPERTS = {"num_experts": 6, "num_hidden_layers": 2}
EXPERT_LAYOUTS = {
    "EP2 distributed optimizer": (2, {"expert": 2, "distributed_optimizer": True}),
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "TP2 SP EP2 DP2": (4, {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "CP2 EP2 distributed optimizer": (2, {"context": 2, "expert": 2, "distributed_optimizer": True}),
    "CP2 TP2 SP EP2": (4, {"context": 2, "tensor": 2, "sequence_parallel": True, "expert": 2}),
    "PP2 EP2, ranks with padding alone": (4, {"pipeline": 2, "expert": 2, "max_tokens_per_microbatch": 1}),
}


@pytest.fixture(scope="module")
def mixture(paths, tmp_path_factory):
    """Return (model, its training on one rank)."""
    model = make_qwen3(tmp_path_factory.mktemp("experts") / "model", tied=False, vocab_size=VOCAB, **EXPERTS)
    return model, run_training(1, training_config(model), paths[1])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, marks=pytest.mark.slow if ranks == 2 or "context" in parallel else ())
        for x, (ranks, parallel) in EXPERT_LAYOUTS.items()
    ],
)
def test_layout_does_not_change_training_of_experts(layout, paths, mixture):
    world_size, parallel = EXPERT_LAYOUTS[layout]
    config = training_config(mixture[0], parallel=ParallelConfig(**{"max_tokens_per_microbatch": 256, **parallel}))
    assert_same_training(run_training(world_size, config, paths[1]), mixture[1])


@pytest.mark.parametrize("layout", [{"sequence_parallel": True}, pytest.param({}, marks=pytest.mark.slow)])
def test_ranks_may_share_a_key_value_head(layout, paths, tmp_path):
    model = make_qwen3(tmp_path / "model", vocab_size=VOCAB, num_hidden_layers=2, num_key_value_heads=1)
    parallel = ParallelConfig(tensor=2, max_tokens_per_microbatch=64, **layout)
    got = run_training(2, training_config(model, parallel=parallel, **PAPER), paths[1])
    assert_same_training(got, run_training(1, training_config(model, **PAPER), paths[1]))


FAMILY_LAYOUTS = {
    "TP2 SP": {"tensor": 2, "sequence_parallel": True},
    "PP2": {"pipeline": 2, "distributed_optimizer": True},
    "CP2": {"context": 2},
}


@pytest.mark.parametrize("lora", [0, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_layout_does_not_change_training_of_the_family(family, lora, paths, tmp_path):
    model = make_model(tmp_path / "model", family, tied=False, vocab_size=VOCAB, num_hidden_layers=2)
    changes = PAPER | {"lora": LoraConfig(rank=lora)}
    expected = run_training(1, training_config(model, **changes), paths[1])
    for layout in FAMILY_LAYOUTS.values():
        parallel = ParallelConfig(**{"max_tokens_per_microbatch": 64, **layout})
        got = run_training(2, training_config(model, parallel=parallel, **changes), paths[1])
        assert_same_training(got, expected)


ADAPTER_LAYOUTS = {
    "TP2 SP PP2": (4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2}, TARGETS),
    "PP2 VPP2, recompute": (2, {"pipeline": 2, "virtual_pipeline": 2, "recompute": True}, TARGETS),
    "TP2, some projections": (2, {"tensor": 2}, ("q_proj", "v_proj", "up_proj", "o_proj")),
    "recompute the MLP": (
        1,
        {"megatron": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}},
        ("gate_proj", "down_proj"),
    ),
    "DP2, ranks with padding alone": (
        2,
        {"max_tokens_per_microbatch": 1, "distributed_optimizer": True, "overlap_grad_reduce": True},
        TARGETS,
    ),
    "experts TP2 SP EP2": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2}, ATTENTION),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow if x == "TP2 SP PP2" else ()) for x in ADAPTER_LAYOUTS]
)
def test_layout_does_not_change_training_of_adapters(layout, paths, mixture):
    """test_lora.py has the plain layouts, against PEFT."""
    world_size, parallel, targets = ADAPTER_LAYOUTS[layout]
    model = mixture[0] if "experts" in layout else paths[0][False]
    changes = PAPER | {"lora": LoraConfig(rank=4, targets=list(targets))}
    expected = run_training(1, training_config(model, **changes), paths[1])
    parallel = ParallelConfig(**{"max_tokens_per_microbatch": 256, **parallel})
    assert_same_training(
        run_training(world_size, training_config(model, parallel=parallel, **changes), paths[1]), expected
    )


@pytest.mark.parametrize(
    ("teacher", "split"),
    [
        pytest.param("frozen", {"tensor": 2}, marks=pytest.mark.slow),
        ("ema", {"tensor": 2}),
        ("snapshot", {"tensor": 2}),
        pytest.param("ema", {"context": 2}, marks=pytest.mark.slow),
    ],
)
def test_teacher_weights_and_several_updates_agree_across_layouts(teacher, split, paths):
    models, rollouts = paths
    changes = {
        "teacher": TeacherConfig(weights=teacher, ema_decay=0.5, snapshot_every=2),
        # Adam's first step moves a weight by the learning rate even if its gradient is rounding noise; the second
        # update of the batch sees that, so the rate is small here.
        "optimizer": OptimizerConfig(lr=1e-4, updates_per_batch=2),
        "objective": dataclasses.replace(
            GROUPS, importance_cap=None, loss_normalization="seq_mean", entropy_normalization="sequence_max"
        ),
    }
    expected = run_training(1, training_config(models[True], **changes), rollouts)
    parallel = ParallelConfig(max_tokens_per_microbatch=128, **split)
    assert_same_training(
        run_training(2, training_config(models[True], parallel=parallel, **changes), rollouts), expected
    )


@pytest.mark.slow
def test_the_kl_penalty_agrees_across_layouts(paths):
    models, rollouts = paths
    changes = {"objective": dataclasses.replace(GROUPS, importance_cap=None, kl_coef=0.5)}
    expected = run_training(1, training_config(models[False], **changes), rollouts)
    assert 0 == expected[0][0]["loss/kl"] < expected[0][1]["loss/kl"] < expected[0][2]["loss/kl"]
    split = ParallelConfig(tensor=2, pipeline=2, max_tokens_per_microbatch=128)
    assert_same_training(run_training(4, training_config(models[False], parallel=split, **changes), rollouts), expected)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["frozen", "live"])
def test_the_kl_penalty_holds_the_policy_at_its_initial_weights(teacher, paths):
    """The first update starts from them, so the penalty does not change it. A larger one keeps the policy nearer."""
    models, rollouts = paths
    kl = []
    for coefficient in (1e-9, 1.0, 30.0):
        objective = dataclasses.replace(GROUPS, importance_cap=None, kl_coef=coefficient)
        changes = {"objective": objective, "teacher": TeacherConfig(weights=teacher)}
        metrics, _ = run_training(1, training_config(models[True], steps=6, **changes), rollouts)
        assert metrics[0]["loss/kl"] == pytest.approx(0, abs=1e-9)
        kl.append(metrics[-1]["loss/kl"])
    assert kl[0] > 1.2 * kl[1] > 1.2 * kl[2] > 0, kl


@pytest.mark.parametrize("tied", METHOD)
def test_order_of_the_rollouts_does_not_change_training(tied, paths, reference, tmp_path):
    models, _ = paths
    save_rollouts(made_up_rollouts()[::-1], tmp_path / "reversed.jsonl")
    config = training_config(models[tied], **METHOD[tied])
    assert_same_training(run_training(1, config, tmp_path / "reversed.jsonl"), reference[tied])


def test_a_frozen_router_stays_as_it_is(paths, mixture):
    """And all else trains, alike with the optimizer's state on one rank and divided."""
    frozen = OptimizerConfig(lr=1e-3, clip_grad=0.5, freeze_router=True)
    layouts = ParallelConfig(), ParallelConfig(expert=2, distributed_optimizer=True)
    one, two = (
        run_training(n, training_config(mixture[0], optimizer=frozen, parallel=layout), paths[1])
        for n, layout in enumerate(layouts, 1)
    )
    assert_same_training(two, one)
    for name, before in load_file(mixture[0] / "model.safetensors").items():
        assert before.equal(one[1][name]) == name.endswith("mlp.gate.weight"), name
