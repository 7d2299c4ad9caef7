"""The tensor-parallel group of megatron-core, for the peers that take it from there."""

import importlib
from typing import Any

import torch
import torch.distributed as dist

from megatron_egrsd.vocab_parallel.shard import rank_and_size


def megatron_group() -> Any:
    """Return the group that Megatron-LM's functions use if they are given none."""
    return importlib.import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()


def default_group(group: Any) -> Any:
    """Return `group`, or the default group for None as torch.distributed does, or None without one."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def check_start(vocab_start: int, logits: torch.Tensor, group: Any) -> None:
    """Raise ValueError if this rank's columns do not begin where equal shards in rank order have them."""
    expected = rank_and_size(group)[0] * logits.shape[-1]
    if int(vocab_start) != expected:
        raise ValueError(f"the shard begins at id {int(vocab_start)}, equal shards in rank order have {expected} there")
