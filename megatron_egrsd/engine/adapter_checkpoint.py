"""Store an adapter in a checkpoint: its tensors by PEFT name, its form, and the hash of the weights below it."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

from megatron_egrsd.engine.weights import own_shards
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapters import AdapterSpec
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.fingerprint import fingerprint


def sharded_adapter(
    chunks: list[torch.nn.Module], arch: Architecture, adapter: AdapterSpec, prefix: str = ""
) -> dict[str, dict[str, ShardedTensor]]:
    """Return {chunk: {`prefix` + name of the parameter: its place}}; a place is called `prefix` + the PEFT name."""
    state: dict[str, dict[str, ShardedTensor]] = {str(i): {} for i in range(len(chunks))}
    for shard in own_shards(chunks, arch, adapter):
        key, split = prefix + shard.entry.hf[0], shard.entry.layout.dim
        state[str(shard.chunk)][prefix + shard.name] = (
            make_sharded_tensor_for_checkpoint(shard.parameter, key)
            if split is None
            else make_tp_sharded_tensor_for_checkpoint(shard.parameter, key, split)
        )
    return state


def describe(adapter: AdapterSpec | None, model_path: str) -> dict[str, Any] | None:
    """Return what `check` compares, as plain values; None for a run that trains all weights. Reads all weights once."""
    if adapter is None:
        return None
    base = {"path": str(Path(model_path).resolve()), "sha256": _fingerprint(model_path)}
    return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets), "base": base}


def check(path: Path, saved: dict[str, Any] | None, own: dict[str, Any] | None) -> None:
    """Raise BadArgument if the checkpoint `path`, of the run `saved`, cannot be continued by the run `own`."""
    if saved == own:
        return
    if saved is None:
        raise BadArgument(f"{path} holds the training of all weights; continue it with lora.rank 0, or start a new run")
    form = f"rank {saved['rank']}, alpha {saved['alpha']:g} and targets {', '.join(saved['targets'])}"
    if own is None or any(saved[key] != own[key] for key in ("rank", "alpha", "targets")):
        raise BadArgument(f"{path} holds an adapter of {form}; continue it with the same lora section")
    if saved["base"]["sha256"] != own["base"]["sha256"]:
        raise BadArgument(
            f"{path} holds an adapter of the model {saved['base']['path']} as it was then, whose weights differ from "
            f"those of model.path = {own['base']['path']}; continue it with that model"
        )


@lru_cache(maxsize=1)
def _fingerprint(model_path: str) -> str:
    return fingerprint(model_path)
