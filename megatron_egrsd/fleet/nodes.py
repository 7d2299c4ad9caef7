"""The first rank of every node, for tasks that each node does for itself: starting SGLang, handing weights over."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_egrsd.engine.distributed import exhaust, gather, on_first_rank, to_the_end
from megatron_egrsd.rollout.servers import ServersLost
from megatron_egrsd.rollout.tensor_handles import flatten, unflatten
from megatron_egrsd.rollout.transports import NamedTensors, buckets
from megatron_egrsd.system import torchrun

T = TypeVar("T")


class Nodes:
    """The nodes of a job in the order of their ranks. Made by every rank, and every rank makes the same calls.

    The ranks that one torchrun started are a node; a process that torchrun did not start is a node of its own.
    `timeout` is the seconds that one node waits for another.
    """

    def __init__(self, timeout: float):
        self.leaders = [rank for rank, leads in enumerate(gather(torchrun.local_rank() == 0)) if leads]
        self._group = None
        if len(self.leaders) > 1:
            self._group = dist.new_group(self.leaders, timeout=timedelta(seconds=timeout))

    def __len__(self) -> int:
        return len(self.leaders)

    @property
    def index(self) -> int | None:
        """The number of this rank's node if it is the first rank there; None on all other ranks."""
        rank = dist.get_rank()
        return self.leaders.index(rank) if rank in self.leaders else None

    def each(self, function: Callable[[], T]) -> list[T]:
        """Run `function` on the first rank of every node; return its results, in the nodes' order, on every rank.

        If a function fails, its exception is raised on every rank. If several fail, a fatal error takes precedence
        over ServersLost.
        """
        outcome: Any = None
        if self.index is not None:
            try:
                outcome = function(), None
            except Exception as error:
                outcome = None, error
        outcomes: Any = [outcome]
        if self.index is not None and self._group is not None:
            outcomes = [None] * len(self) if self.index == 0 else None
            dist.gather_object(outcome, outcomes, group=self._group, group_dst=0)

        def results() -> list[T]:
            errors = [error for _, error in outcomes if error is not None]
            if errors:
                raise min(errors, key=lambda e: isinstance(e, ServersLost))
            return [result for result, _ in outcomes]

        return on_first_rank(results)

    def each_while(self, function: Callable[[Iterator], T], stream: Iterator) -> list[T]:
        """Do as `each`, for a `function` that consumes `stream`, an iterator that every rank must exhaust."""
        if self.index is None:
            exhaust(stream)
        return self.each(to_the_end(function, stream))

    def share(self, stream: NamedTensors, device: torch.device, bucket_size: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield rank 0's `stream` on the first rank of every node; nothing on other ranks.

        Args:
            stream: (name, tensor) on rank 0; on all others the same names with tensors of the same shapes and
                types, whose contents do not matter.
            device: Device of the tensors that are yielded.
            bucket_size: Bytes that travel together; a larger tensor travels alone.
        """
        for bucket in buckets(stream, bucket_size):
            if self.index is None:
                continue
            if self._group is not None:
                if self.index == 0:
                    flat = flatten(bucket, device)
                else:
                    flat = torch.empty(sum(t.numel() for _, t in bucket), dtype=bucket[0][1].dtype, device=device)
                dist.broadcast(flat, src=self.leaders[0], group=self._group)
                bucket = unflatten(flat, bucket)
            yield from bucket
