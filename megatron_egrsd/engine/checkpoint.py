"""Training checkpoints: weights, optimizer, schedule and moving-average teacher, in megatron-core's sharded format.

A checkpoint is a directory step_NNNNNN. It is written under another name and renamed when every rank has finished, so
it is complete or it is not there. Any layout can load it. What needs no saving: the order of the problems follows from
seed and step, the frozen teacher from model.path, and training draws no random numbers (there is no dropout).
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument


def newest(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step in `directory`, or None."""
    found = [p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name)] if directory.is_dir() else []
    return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def save(engine: Engine, directory: Path, step: int, keep: int) -> None:
    """Write `directory`/step_NNNNNN, then remove all but the newest `keep`. Collective: every rank calls it."""
    path = directory / f"step_{step:06d}"
    partial = path.with_name(path.name + ".partial")
    if engine.is_first_rank:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(engine, step, loading=False), str(partial))
    dist.barrier()
    if engine.is_first_rank:
        partial.rename(path)
        complete = sorted(p for p in directory.glob("step_*") if p.suffix != ".partial")
        for old in complete[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(engine: Engine, path: Path) -> int:
    """Continue from a checkpoint, saved in whatever layout; returns its step. Collective.

    Raises BadArgument where `path` is not a checkpoint of this model.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise BadArgument(f"{path} is not a checkpoint")
    for optimizer in _distributed_optimizers(engine):
        _prepare_torch_adam(optimizer)
    try:
        state = dist_checkpointing.load(_state(engine, 0, loading=True), str(path))
    except dist_checkpointing.core.CheckpointingException as error:
        raise BadArgument(f"{path} does not belong to this model: {error}") from None
    engine.module.load_state_dict(state["model"])
    engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.load_state_dict(state["scheduler"])
    if "teacher" in state:
        for (name, _), teacher in zip(engine.module.named_parameters(), engine.teacher_weights, strict=True):
            teacher.copy_(state["teacher"][name])
    return state["step"]


def _state(engine: Engine, step: int, *, loading: bool) -> dict:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = engine.module.sharded_state_dict(metadata=metadata)
    state = {
        "model": model,
        "optimizer": engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "scheduler": engine.scheduler.state_dict(),
        "step": step,
    }
    if engine.config.teacher.weights == "ema" and engine.teacher_weights is not None:
        names = [name for name, _ in engine.module.named_parameters()]
        sharded = engine.module.sharded_state_dict(prefix="teacher.", metadata=metadata)
        state["teacher"] = {
            name: _with_data(sharded[f"teacher.{name}"], teacher)
            for name, teacher in zip(names, engine.teacher_weights, strict=True)
        }
    return state


def _with_data(sharded: ShardedTensor | ShardedTensorFactory, data: torch.Tensor):
    """The same place in the checkpoint for other values: the teacher's, in their own type."""
    if isinstance(sharded, ShardedTensor):
        return replace(sharded, data=data, dtype=data.dtype)
    return replace(sharded, data=data)


def _distributed_optimizers(engine: Engine) -> list[DistributedOptimizer]:
    parts = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


def _prepare_torch_adam(optimizer: DistributedOptimizer) -> None:
    """Make megatron-core's distributed optimizer loadable with torch's AdamW (no Transformer Engine, no apex).

    Its state_dict() expects an initialised state. And its load_state_dict gives all parameters one shared `step`
    tensor, which every parameter's update then counts up: each gets its own here, before its moments are copied in.
    """
    if not isinstance(optimizer.optimizer, torch.optim.AdamW | torch.optim.Adam):
        return
    for group in optimizer.optimizer.param_groups:
        for p in group["params"]:
            optimizer.optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(model_param, tensors):
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].detach().clone()
            tensors = {**tensors, "step": state["step"]}
        return original(model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states
