"""The state of a training run as megatron-core's sharded tensors: what checkpoint.py writes and reads."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_egrsd.engine import adapter_checkpoint
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.engine.optimizer import parts, with_settings_of


def sharded(engine: Engine, step: int, history: dict[str, Any], *, loading: bool) -> dict:
    """Return all that a run continues from, each tensor with its place in a checkpoint of any layout. Collective.

    `history` is what earlier steps leave to the objective. With `loading` the tensors are those to be filled.
    """
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = _sharded_chunks(engine, metadata)
    if not loading:
        for optimizer in parts(engine.optimizer):
            _begin_moments(optimizer)
    state = {
        "model": model,
        "optimizer": engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "scheduler": engine.scheduler.state_dict(),
        "step": step,
        "rewards": history,  # its name in all versions
        "updates_per_batch": engine.updates_per_batch,
        "distributed_optimizer": engine.parallel.distributed_optimizer,
    }
    if engine.teacher.weights in ("ema", "snapshot") and engine.teacher_weights is not None:
        state["teacher"] = {i: {} for i in model}
        places = _sharded_chunks(engine, metadata, "teacher.")
        for (i, name), teacher in zip(_names(engine), engine.teacher_weights, strict=True):
            state["teacher"][i][name] = _with_data(places[i][f"teacher.{name}"], teacher)
    return state


def prepare_to_load(engine: Engine) -> None:
    """Make the engine's optimizer ready for `sharded` with `loading`, and for `restore`."""
    for optimizer in parts(engine.optimizer):
        if isinstance(optimizer, DistributedOptimizer):
            _prepare_torch_adam(optimizer)


def restore(engine: Engine, state: dict) -> None:
    """Give the engine a loaded state.

    It brings weights, moments and the position in the schedule; learning rates, decays and the schedule's shape and end
    stay those that the engine was configured with.
    """
    for i, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(state["model"][str(i)], strict=engine.adapter is None)
    engine.optimizer.load_state_dict(with_settings_of(state["optimizer"], engine.optimizer))
    engine.scheduler.load_state_dict(state["scheduler"] | {"num_steps": _updates(engine, state)})
    if "teacher" in state:
        for (chunk_index, name), teacher in zip(_names(engine), engine.teacher_weights, strict=True):
            teacher.copy_(state["teacher"][chunk_index][name])


def _updates(engine: Engine, state: dict) -> int:
    """Return the position in the schedule, in updates of this run's size.

    Updates without a gradient do not count. A position beyond all updates up to the saved step would be trained with
    the last rate of the schedule, which may be 0.
    """
    now, saved = engine.updates_per_batch, state.get("updates_per_batch", engine.updates_per_batch)
    return min(state["scheduler"]["num_steps"] * now // saved, state["step"] * now)


def _sharded_chunks(engine: Engine, metadata: dict, prefix: str = "") -> dict[str, dict]:
    """Return each chunk's trained parameters with their places in the checkpoint.

    The chunk's number is no part of a place, only of this key.
    """
    if engine.adapter:
        return adapter_checkpoint.sharded_adapter(engine.chunks, engine.arch, engine.adapter, prefix)
    return {str(i): c.sharded_state_dict(prefix=prefix, metadata=metadata) for i, c in enumerate(engine.chunks)}


def _names(engine: Engine) -> list[tuple[str, str]]:
    """Return (chunk, name) of every parameter of engine.trainable()."""
    return [
        (str(i), name)
        for i, chunk in enumerate(engine.chunks)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    ]


def _with_data(place: ShardedTensor | ShardedTensorFactory, data: torch.Tensor):
    """Return the same place in the checkpoint for other values: the teacher's, in their own type."""
    if isinstance(place, ShardedTensor):
        return replace(place, data=data, dtype=data.dtype)
    return replace(place, data=data)


def _begin_moments(optimizer: MegatronOptimizer) -> None:
    """Give Adam the moments that it makes at its first update, zeros: a run that is stopped before it can continue."""
    adam = optimizer.optimizer
    if not isinstance(adam, torch.optim.AdamW | torch.optim.Adam):
        optimizer.init_state_fn(adam, optimizer.config)
        return
    for group in adam.param_groups:
        for p in group["params"]:
            if not adam.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[p] = {"step": torch.tensor(0.0), **zeros}


def _prepare_torch_adam(optimizer: DistributedOptimizer) -> None:
    """Make megatron-core's distributed optimizer loadable with torch's AdamW (no Transformer Engine, no apex).

    Its state_dict() expects an initialised state. And its load_state_dict gives all parameters one shared `step`
    tensor, which every parameter's update then counts up: each gets its own here, before its moments are copied in.
    """
    if not isinstance(optimizer.optimizer, torch.optim.AdamW | torch.optim.Adam):
        return
    _begin_moments(optimizer)
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(model_param, tensors):
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].detach().clone()
            tensors = {**tensors, "step": state["step"]}
        return original(model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states
