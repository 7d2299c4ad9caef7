"""Run a function on several gloo ranks, each its own process, with a hard deadline."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from megatron_egrsd.rollout.ports import choose_ports
from tests.processes import kill_tree

# A rank begins as a copy of a process that has imported these, one thread and no state: alone it would take 10 s.
# The last two are imported by the tests' own files, which a rank imports to find its function.
_IMPORTED = ["torch", "megatron_egrsd.train", "megatron_egrsd.engine.checkpoint", "pytest", "peft"]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, fresh: bool = False
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank in torchrun's environment; returns results in rank order.

    `function` must be importable (module level). A rank that raises fails the test with its traceback; ranks that
    are still running at the deadline are killed, by process id. `fresh` ranks have imported nothing.
    """
    context = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload(_IMPORTED)
    (port,) = choose_ports("127.0.0.1", 0, 1)
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(function, rank, world_size, port, sender, dict(os.environ), args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        results, pending, deadline = {}, dict(enumerate(pipes)), time.monotonic() + timeout
        while pending:
            ready = wait(pending.values(), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending)} of {world_size} have not answered within {timeout:.0f} s")
            for rank in [r for r, receiver in pending.items() if receiver in ready]:
                ok, value = pending.pop(rank).recv()
                # The first failure counts: the other ranks may be waiting for this one for ever.
                if not ok:
                    raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(0.5)
            if process.is_alive():
                kill_tree(process.pid)
                process.join()


def _rank(function, rank, world_size, port, sender, environment, args):
    os.environ.clear()
    os.environ.update(
        environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        sender.send((True, function(rank, world_size, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
