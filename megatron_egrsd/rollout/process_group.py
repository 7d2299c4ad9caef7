"""A process group between one training rank and the servers, beside torch.distributed's own.

SGLang joins with `init_custom_process_group`; this module is the trainer's counterpart. It neither uses nor changes
torch.distributed's default group.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_egrsd.errors import RunError

# The defaults that SGLang 0.5 sets in its processes.
_SGLANGS_NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}


def use_sglangs_nccl_settings() -> None:
    """Set SGLang's NCCL defaults in this process and its children; variables that the user has set stay.

    NCCL cannot connect ranks that differ in the first setting: the group would fail with "invalid argument". All
    training ranks must call this before their first communicator, because rank 0 shares its communicators with them.
    """
    for name, value in _SGLANGS_NCCL.items():
        os.environ.setdefault(name, value)


def address_towards(url: str) -> str:
    """Return the address of this host that the host of `url` can reach. Raises RunError if no network leads there."""
    family, address = _resolved(url)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            return probe.getsockname()[0]
    except OSError as error:
        raise RunError(f"the host of {url} cannot be reached: {error.strerror}") from None


def is_local(url: str) -> bool:
    """Return whether the host of `url` is this one: packets to this host leave from the address that they go to.

    Loopback addresses (127.0.1.1, Debian's own host name) and 0.0.0.0 are this host too. Raises as `address_towards`.
    """
    _, (host, *_) = _resolved(url)
    return is_loopback(host) or ip_address(host).is_unspecified or host == address_towards(url)


def is_loopback(address: str) -> bool:
    """Return whether only this host reaches `address`."""
    return ip_address(address).is_loopback


def _resolved(url: str) -> tuple[int, tuple]:
    """Return family and socket address of the host of `url`, by IPv4 if it has such an address."""
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise RunError(f"the host of {url} has no address: {error.strerror}") from None
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


class BroadcastGroup:
    """Rank 0 of a group of `world_size`; the servers hold the other ranks. `timeout` in seconds.

    Creation has two steps, because the servers' request to join returns only after rank 0 has joined: the constructor
    opens the rendezvous at `address`:`port`, `join` completes it.
    """

    def __init__(self, name: str, address: str, world_size: int, device: torch.device, timeout: float):
        self.name = name
        self.world_size = world_size
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.timeout = timeout
        # Port 0: the store picks a free one. Waiting for the others is left to `join`.
        self._store = dist.TCPStore(address, 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)
        self.port = self._store.port
        self._group = None

    def join(self) -> None:
        """Join as rank 0; returns when every server has joined. Raises RunError after the timeout."""
        # Same keys as SGLang's side: prefix `name`, then torch's own. As in SGLang there is no public call for
        # a group that is independent of the default one.
        try:
            self._group, _ = distributed_c10d._new_process_group_helper(
                self.world_size, 0, [], dist.Backend(self.backend), dist.PrefixStore(self.name, self._store),
                group_name=self.name, timeout=timedelta(seconds=self.timeout))  # fmt: skip
        except RuntimeError as error:  # DistStoreError, gloo's timeouts
            raise RunError(f"the weight group of {self.world_size} ranks did not form: {error}") from error
        distributed_c10d._world.pg_group_ranks[self._group] = {i: i for i in range(self.world_size)}

    def broadcast(self, tensor: torch.Tensor, deadline: float, check: Callable[[], None]) -> None:
        """Send `tensor` to every server. `check` is polled meanwhile; it raises if a server cannot take part any more.

        Raises RunError if a server closed its connection, or `deadline` (time.monotonic) has passed.
        """
        try:
            work = dist.broadcast(tensor, src=0, group=self._group, async_op=True)
            while not work.is_completed():
                check()
                if time.monotonic() > deadline:
                    raise RunError("the broadcast of the weights did not finish in time")
                time.sleep(0.0005)
            work.wait()  # raises the error of the broadcast, if any
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"the broadcast of the weights failed: {str(error).splitlines()[0]}") from error

    def close(self, patience: float = 5.0) -> None:
        """Leave the group. torch waits for an abandoned broadcast: in the background after `patience` seconds."""
        if self._group is None:
            return
        group, self._group = self._group, None
        leaving = threading.Thread(target=dist.destroy_process_group, args=(group,), daemon=True)
        del group
        leaving.start()
        leaving.join(patience)
