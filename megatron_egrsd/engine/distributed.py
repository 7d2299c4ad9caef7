"""Process groups: torchrun's environment (or one process alone) into megatron-core's parallel state."""

import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.system import torchrun
from megatron_egrsd.system.files import handles_error

T = TypeVar("T")
# Facts that all ranks must have in common, by name: a hash, and what to do if a rank has another one.
Facts = dict[str, tuple[str, str]]


def initialize(config: ParallelConfig, seed: int, facts: Facts | None = None) -> torch.device:
    """Start torch.distributed and megatron-core's groups; returns this rank's device.

    NCCL if CUDA is available, else gloo. A process that torchrun did not start is a world of one. Raises
    BadArgument on every rank if one has other `facts` than rank 0 (run/agreement.py): nothing has been built then.
    Raises RunError if torchrun has ended, and an error that `lost_contact` recognises if a rank is out of reach.
    """
    timeout = timedelta(seconds=config.timeout)
    if torch.cuda.is_available():
        device = torch.device("cuda", torchrun.local_rank())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if torchrun.is_launched():
        if torchrun.has_ended():
            raise RunError(f"rank {torchrun.rank()} ends: its torchrun, which starts and watches the ranks, has ended")
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps its store over a restart: without a name for each, gloo would connect to the ranks that died.
        store = dist.PrefixStore(f"restart_{torchrun.restart_count()}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    _check_agreement(facts or {})
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.interleaved,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,  # many small experts: whole ones on few ranks beat slices of all on many
        distributed_timeout_minutes=config.timeout / 60,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return device


def _check_agreement(facts: Facts) -> None:
    gathered = gather((socket.gethostname(), facts))
    first_host, expected = gathered[0]
    for rank, (host, found) in enumerate(gathered):
        for name, (value, hint) in expected.items():
            if found.get(name) != (value, hint):
                raise BadArgument(f"rank {rank} on {host} has other {name} than rank 0 on {first_host}: {hint}")


def shutdown() -> None:
    """Leave the process groups; safe to call twice or after a failed start."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_contact(error: BaseException | None) -> RunError | None:
    """Return the error for an exception that a collective raised: another rank is gone, stuck or out of reach.

    None for any other exception. gloo raises plain RuntimeErrors that name its source file; the rest are DistErrors.
    """
    if error is None or handles_error(error):
        return None
    if not isinstance(error, dist.DistError) and not (type(error) is RuntimeError and "gloo" in str(error)):
        return None
    reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
    rank = torchrun.rank()
    return RunError(
        f"rank {rank} on {socket.gethostname()} lost contact to another rank; if a node or rank failed first, its own "
        f"message says why, else check the network, or raise parallel.timeout ({reason}); --resume auto continues "
        "from the last checkpoint"
    )


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the `value` of every rank of `group` (default: all), in the order of the ranks, on each of them."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_first_rank(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its result, or raise its exception, on every rank.

    A failure of the one process that talks to SGLang ends the job instead of leaving the others waiting.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [function(), None]
        except Exception as error:
            outcome = [None, error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def on_first_rank_while(function: Callable[[Iterator], T], stream: Iterator) -> T:
    """Call `on_first_rank` with a `function` that consumes `stream`, an iterator that every rank must exhaust."""
    if dist.get_rank() != 0:
        exhaust(stream)
    return on_first_rank(to_the_end(function, stream))


def to_the_end(function: Callable[[Iterator], T], stream: Iterator) -> Callable[[], T]:
    """Return a call of `function` that exhausts `stream`, also after a failure: the other ranks are still sending."""

    def run() -> T:
        try:
            return function(stream)
        finally:
            exhaust(stream)

    return run


def exhaust(stream: Iterator) -> None:
    """Take part in a `stream` that other ranks consume."""
    for _ in stream:
        pass
