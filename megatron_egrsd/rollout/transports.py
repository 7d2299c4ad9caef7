"""Transports of weights to the servers: a process group, handles to memory of this host, a temporary checkpoint."""

import contextlib
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.process_group import BroadcastGroup, address_towards, is_local, is_loopback
from megatron_egrsd.rollout.tensor_handles import Bucket, flatten, share

_TEMPORARY = "weight-sync-"  # begins the name of a temporary directory
NamedTensors = Iterable[tuple[str, torch.Tensor]]


class Transport(ABC):
    """A way to send weights to the servers of `control`. The methods raise the errors of `Control.on_all`.

    The tensors are on `device` when they are sent. Temporary files go into `directory`, or the system's own place.
    """

    only_here: ClassVar[bool] = False  # whether it reaches only the servers that were launched on this node

    def __init__(self, control: Control, bucket_bytes: int, device: torch.device, directory: Path | None):
        self.control, self.bucket_bytes, self.device, self.directory = control, bucket_bytes, device, directory

    def connect(self) -> None:
        """Set up the connections that are missing, if the transport has any; called before each push."""
        return

    def disconnect(self) -> None:
        """Close the connections, if the transport has any. Idempotent; raises nothing."""
        return

    @abstractmethod
    def send(self, named_tensors: NamedTensors, version: int) -> str:
        """Send the tensors of `version`; every server holds them when this returns.

        Returns the name of the adapter that requests must ask for, "" if the weights themselves were sent.
        """

    def _send_buckets(self, named_tensors: NamedTensors, send_bucket: Callable[[Bucket], None]) -> None:
        """Send the tensors by one call of `send_bucket` a bucket."""
        self.control.on_all("begin_weight_update", {})
        for bucket in buckets(named_tensors, self.bucket_bytes):
            send_bucket(bucket)
        self.control.on_all("end_weight_update", {})

    @contextlib.contextmanager
    def _temporary_directory(self) -> Iterator[str]:
        """Yield a directory for files that the servers read now; remove it, and first what a killed run has left."""
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self.directory, ignore_cleanup_errors=True) as path:
            yield path

    def _tensor_parallel_sizes(self) -> list[int]:
        return [self.control.request("GET", url, "server_info")["tp_size"] for url in self.control.urls]


class Distributed(Transport):
    """A process group of this process and all servers: one broadcast of flattened bytes per bucket."""

    def __init__(self, *args):
        super().__init__(*args)
        self._group: BroadcastGroup | None = None

    def connect(self) -> None:
        self._group = self._group or self._form_group()

    def disconnect(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # First the servers' ends: it also ends a broadcast that was abandoned, which our end would wait for.
            self.control.tell("destroy_weights_update_group", {"group_name": group.name}, timeout=5)
            group.close()

    def send(self, named_tensors: NamedTensors, version: int) -> str:
        self._send_buckets(named_tensors, self._broadcast)
        return ""

    def _form_group(self) -> BroadcastGroup:
        sizes = self._tensor_parallel_sizes()
        # One address for all servers: if one is elsewhere, not this host's loopback.
        address = max(map(address_towards, self.control.urls), key=lambda a: not is_loopback(a))
        # A group that was abandoned, by a killed run or by ours, may still be there when the next one forms.
        name = f"megatron_egrsd_weights_{secrets.token_hex(4)}"
        group = BroadcastGroup(name, address, 1 + sum(sizes), self.device, self.control.timeout)
        bodies = [{"master_address": address, "master_port": group.port, "rank_offset": 1 + sum(sizes[:i]),
                   "world_size": group.world_size, "group_name": name, "backend": group.backend}
                  for i in range(len(sizes))]  # fmt: skip
        self.control.on_all("init_weights_update_group", bodies, meanwhile=lambda check: group.join())
        return group

    def _broadcast(self, bucket: Bucket) -> None:
        flat = flatten(bucket, self.device).view(torch.uint8)
        announcement = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
            "shapes": [list(t.shape) for _, t in bucket],
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": True,  # the KV cache belongs to the old weights
        }
        send = partial(self._group.broadcast, flat, self.control.deadline)
        self.control.on_all("update_weights_from_distributed", announcement, meanwhile=send)


class Handles(Transport):
    """Handles to memory of this host: the servers, on the same host, copy the tensors of each bucket themselves."""

    only_here = True

    def __init__(self, *args):
        super().__init__(*args)
        self._sizes: list[int] = []  # tensor-parallel size of each server

    def connect(self) -> None:
        for url in self.control.urls:
            if not is_local(url):
                raise RunError(f'rollout.sync.transport is "ipc", which hands over memory of this host, but {url} '
                               'is another host; choose "distributed" or "disk"')  # fmt: skip
        self._sizes = self._tensor_parallel_sizes()

    def send(self, named_tensors: NamedTensors, version: int) -> str:
        self._send_buckets(named_tensors, self._hand_over)
        return ""

    def _hand_over(self, bucket: Bucket) -> None:
        handles, _buffer = share(bucket, self.device)  # the buffer lives until all servers have copied it
        # Every tensor-parallel rank opens the same tensors and keeps its part of them.
        bodies = [{"serialized_named_tensors": [handles] * size, "flush_cache": True} for size in self._sizes]
        self.control.on_all("update_weights_from_tensor", bodies)


class Disk(Transport):
    """A temporary checkpoint, which the servers read; they must see its directory."""

    def send(self, named_tensors: NamedTensors, version: int) -> str:
        from safetensors.torch import save_file

        with self._temporary_directory() as directory:
            for i, bucket in enumerate(buckets(named_tensors, self.bucket_bytes)):
                tensors = {name: t.detach().cpu().contiguous() for name, t in bucket}
                save_file(tensors, f"{directory}/model-{i:05d}.safetensors", {"format": "pt"})
            self.control.on_all("update_weights_from_disk", {"model_path": directory, "flush_cache": True})
        return ""


TRANSPORTS: dict[str, type[Transport]] = {"distributed": Distributed, "ipc": Handles, "disk": Disk}


def buckets(named_tensors: NamedTensors, size: int) -> Iterator[Bucket]:
    """Yield buckets of consecutive tensors of one type, together at most `size` bytes; a larger tensor comes alone."""
    bucket, filled = [], 0
    for name, tensor in named_tensors:
        # One type a bucket keeps every tensor aligned within the flattened bytes.
        if bucket and (filled + tensor.nbytes > size or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += tensor.nbytes
    if bucket:
        yield bucket
