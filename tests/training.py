"""A training run on made-up rollouts of a small model, on any number of ranks, and the comparison of two such runs."""

import dataclasses
import itertools
from collections.abc import Iterable

import pytest
import torch

from megatron_egrsd.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TeacherConfig,
)
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts
from megatron_egrsd.objectives.load import needs_teacher
from megatron_egrsd.objectives.signal import History
from tests.ranks import run_ranks

GROUPS = ObjectiveConfig(advantage="group", length_bonus=0.0, loss="ppo", importance_cap=2.0)
# The paper's defaults; the running statistics count from the second step on.
PAPER = {"objective": ObjectiveConfig(advantage_warmup=1), "teacher": TeacherConfig()}
VOCAB = 61  # not a multiple of 8 x TP, so that every layout pads


def training_config(model, **changes) -> Config:
    """Configure three steps of four prompts with four rollouts each; `changes` replaces sections and keys of Config.

    Without changes the objective is GROUPS, and the teacher is live; `**PAPER` makes it the paper's.
    """
    base = Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train="unused"),
        objective=GROUPS,
        teacher=TeacherConfig(weights="live"),
        rollout=RolloutConfig(prompts_per_step=4, rollouts_per_prompt=4, temperature=0.8, max_response_tokens=64),
        parallel=ParallelConfig(max_tokens_per_microbatch=256),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.5, weight_decay=0.01, warmup_steps=1),
        steps=3,
        max_log_prob_difference=100.0,  # the rollouts' log-probs are made up
    )
    return dataclasses.replace(base, **changes)


def made_up_rollouts(seed: int = 0) -> list[Rollout]:
    """Make a batch for `training_config`: random tokens, responses of 1 to 59 tokens, one group without a signal."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, VOCAB, (length,), generator=g).tolist()

    rollouts = []
    for group in range(4):
        problem = Problem(id=str(group), problem="p", answer="a", solution="s")
        prompt = Prompt(problem, ids(2, 12), ids(12, 30))
        for k in range(4):
            response = ids(1, 60)
            log_probs = (-torch.rand(len(response), generator=g) * 4).tolist()
            # Group 3 is degenerate: all wrong.
            reward = float((k + group) % 2) if group < 3 else 0.0
            rollouts.append(Rollout(prompt, group, response, log_probs, "stop", 0, "", reward))
    return rollouts


def open_engine(config, facts=None):
    """Build the engine of `config`; only the processes of the ranks import megatron-core."""
    from megatron_egrsd.engine.build import build_engine

    return build_engine(config, facts, needs_teacher=needs_teacher(config.objective))


def take_steps(engine, rollouts: list[Rollout], config: Config, steps: int, history: History | None = None):
    """Train `steps` times on the same rollouts, handing the history on as the trainer does; (metrics, history)."""
    from megatron_egrsd.learn import learn

    metrics, history = [], history or History()
    for _ in range(steps):
        result, history = learn(engine, rollouts, config, history=history)
        metrics.append(result)
    return metrics, history


def final_weights(engine) -> dict:
    """Return the weights on rank 0, and the adapter's tensors if there is one, as fp32 numpy arrays by name."""
    tensors = itertools.chain(engine.export_weights(), engine.export_adapter() if engine.adapter else ())
    return {name: tensor.clone().float().numpy() for name, tensor in tensors}


def held_tensors(engine) -> dict[str, list[torch.Tensor]]:
    """Return what an engine keeps: weights, gradients, the optimizer's state with its main weights, teacher's weights.

    Main weights that are the weights themselves are not repeated. "teacher" holds the frozen reference as well.
    """
    from megatron_egrsd.engine.optimizer import parts

    weights = list(engine.parameters())
    optimizers = [part.optimizer for part in parts(engine.optimizer)]
    state = [t for o in optimizers for s in o.state.values() for name, t in s.items() if name != "step"]
    main = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    own = {w.untyped_storage()._cdata for w in weights}
    state += [p for p in main if p.untyped_storage()._cdata not in own]
    teacher = [*(engine.teacher_weights or []), *(engine.reference_weights or [])]
    return {"weights": weights, "gradients": list(engine.gradients()), "optimizer": state, "teacher": teacher}


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind `tensors`, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _train_on_rank(rank, world_size, config, path):
    """Take `config.steps` steps; (metrics of each step, final weights, adapters too) on rank 0, None on the others."""
    rollouts = load_rollouts(path)
    with open_engine(config) as engine:
        metrics, _ = take_steps(engine, rollouts, config, config.steps)
        weights = final_weights(engine)
    return (metrics, weights) if rank == 0 else None


def run_training(world_size, config, path):
    """Train on the rollouts at `path` in `world_size` processes; (metrics of each step, final weights by name)."""
    return _as_torch(run_ranks(_train_on_rank, world_size, config, path)[0])


def _as_torch(result):
    metrics, weights = result
    return metrics, {k: torch.from_numpy(v) for k, v in weights.items()}


def _train_between_checkpoints(rank, world_size, config, path, directory, start, stop):
    from megatron_egrsd.engine import checkpoint

    rollouts, history = load_rollouts(path), History()
    with open_engine(config) as engine:
        if start:
            step, saved = checkpoint.load(engine, checkpoint.complete(directory)[0])
            history = History(**saved)
            assert step == history.steps == start
        metrics, history = take_steps(engine, rollouts, config, stop - start, history)
        checkpoint.save(engine, directory, stop, keep=2, history=dataclasses.asdict(history), metrics_file=path)
        weights = final_weights(engine)
    return (metrics, weights) if rank == 0 else None


def run_steps(world_size, config, path, directory, start, stop):
    """Train steps start .. stop - 1 from a checkpoint in `directory` to the next one; what `run_training` returns."""
    return _as_torch(run_ranks(_train_between_checkpoints, world_size, config, path, directory, start, stop)[0])


def assert_same_training(got, expected, rtol=1e-5):
    """Compare two results of `run_training`: metrics but times, and final weights in relative norm.

    Adapters, whose B starts at zero, to a hundredfold: Adam moves by the learning rate what has next to no gradient.
    """
    for step, (a, b) in enumerate(zip(got[0], expected[0], strict=True)):
        assert set(a) == set(b)
        for name in a:
            if name.startswith("time/") or name in ("batch/micro_batches",):
                continue
            # The policy loss is the mean of terms of about one nat, of both signs, and may be a hundredth of that.
            least = rtol * (0.1 if name == "loss/policy" else 1e-2)
            assert a[name] == pytest.approx(b[name], rel=rtol, abs=least), f"step {step}: {name}"
    for name, weight in expected[1].items():
        difference = (got[1][name] - weight).norm() / weight.norm()
        assert difference < rtol * (100 if ".lora_" in name else 1), f"{name}: relative difference {difference:.1e}"


def assert_resumes_bitwise(world_size, config, path, directory, stop):
    """Train in one go, and from a checkpoint after `stop` steps: the same metrics but times, and the same weights.

    Returns the metrics of the steps after the checkpoint.
    """
    metrics, weights = run_steps(world_size, config, path, directory / "whole", 0, config.steps)
    run_steps(world_size, config, path, directory / "parts", 0, stop)
    resumed, resumed_weights = run_steps(world_size, config, path, directory / "parts", stop, config.steps)
    for a, b in zip(resumed, metrics[stop:], strict=True):
        assert {k: v for k, v in a.items() if "time/" not in k} == {k: v for k, v in b.items() if "time/" not in k}
    assert all(torch.equal(resumed_weights[k], v) for k, v in weights.items())
    return resumed


def assert_resumes_in(layouts, config, path, directory):
    """Train on one rank, and on two in each of `layouts` in turn, each from the last one's checkpoint; compare both.

    A layout is the keys of ParallelConfig that it changes. Each takes an equal share of the steps.
    """
    metrics, weights = run_steps(1, config, path, directory / "whole", 0, config.steps)
    share = config.steps // len(layouts)
    for number, layout in enumerate(layouts):
        parallel = dataclasses.replace(config.parallel, distributed_optimizer=True, **layout)
        split, start = dataclasses.replace(config, parallel=parallel), number * share
        found = run_steps(2, split, path, directory / "parts", start, start + share)
    assert_same_training(found, (metrics[-share:], weights))
