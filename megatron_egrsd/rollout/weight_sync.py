"""The student's weights, from rank 0 into every SGLang server.

One sync sends weights by one of the transports (transports.py), or an adapter (adapter_transports.py), then the new
version, which every server must report. Every request has a deadline.
"""

import time
from pathlib import Path
from typing import Any

import torch

from megatron_egrsd.config import SyncConfig
from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.adapter_transports import ADAPTER_TRANSPORTS
from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.rollout.transports import TRANSPORTS, NamedTensors, Transport
from megatron_egrsd.rollout.weight_checksums import expected_checksums


class WeightSync:
    """Push of weights to the servers, and check that they arrived. Used by one process, with no generation running.

    With `transport: ipc` the servers are those of this node, and every node has a process that does it.

    A failed push leaves the servers with a mixture of old and new weights: those we launched are started anew, and the
    next push, of the same weights, awaits them first.

    All servers must run the same model. The tensors are on `device` when they are sent: CUDA broadcasts over NCCL, CPU
    over gloo. The disk transport's checkpoint goes into `output_directory`, which the servers must see too, or into the
    system's temporary directory. With `adapter`, the content of adapter_config.json, adapters are pushed in place of
    weights.
    """

    def __init__(self, servers: RolloutServers, config: SyncConfig, device: torch.device | str,
                 output_directory: Path | None = None, adapter: dict[str, Any] | None = None):  # fmt: skip
        self.servers = servers
        transports = TRANSPORTS if adapter is None else ADAPTER_TRANSPORTS
        transport: type[Transport] = transports[config.transport]
        self.control = Control(servers, config.timeout, only_here=transport.only_here)
        options: dict[str, Any] = {} if adapter is None else {"adapter": adapter, "check": config.verify}
        arguments = self.control, config.bucket_mib << 20, torch.device(device), output_directory
        self.transport = transport(*arguments, **options)
        # A run that was killed while it pushed left its session open in servers that outlive it.
        self.control.tell("end_weight_update", {}, timeout=5)
        try:
            self.transport.connect()
        except RunError:
            self.close()
            raise

    def push(self, named_tensors: NamedTensors, version: int) -> float:
        """Send named tensors (full, unsharded) to every server as `version`; returns the seconds it took.

        Weights have Hugging Face's names; those that are not among them keep the values of the last push. Servers that
        were lost before are awaited first. Afterwards every server counts again.

        Raises ServersLost if a server died or hangs: push again, from the first tensor on. Raises RunError if a server
        refused, or cannot be started again.
        """
        if any(server.lost for server in self.servers.servers):
            self.servers.recover()
            self.transport.disconnect()
        start = self.control.start_clock()
        try:
            self.transport.connect()
            self.control.await_idle()
            self.servers.adapter = self.transport.send(named_tensors, version)
            self.control.on_all("update_weight_version", {"new_version": str(version), "abort_all_requests": False})
            self.check_version(version)
        except ServersLost as lost:
            self.servers.mark_all_lost(str(lost), anew=True)
            raise
        self.servers.rejoin()
        return time.monotonic() - start

    def serves(self, version: int) -> bool:
        """Return whether every server has the weights of `version`, as far as is known."""
        if any(server.lost for server in self.servers.servers):
            return False
        self.control.start_clock()
        try:
            self.check_version(version)
        except RunError:
            return False
        return True

    def check_version(self, version: int) -> None:
        """Raise RunError naming a server that does not serve weight version `version`."""
        for url in self.control.urls:
            served = self.control.request("GET", url, "model_info")["weight_version"]
            if served != str(version):
                raise RunError(f"{url} serves weight version {served!r} instead of {version}")

    def verify(self, named_tensors: NamedTensors) -> None:
        """Compare every weight that the servers hold with `named_tensors`, bit by bit, by checksums.

        Raises RunError, which names the first tensor that differs, is missing or is unexpected, and the server.
        """
        self.control.start_clock()
        answers = self.control.on_all("weights_checker", {"action": "checksum"})
        ranks = [(url, rank) for url, answer in zip(self.control.urls, answers, strict=True)
                 for rank in answer["ranks"]]  # fmt: skip
        shard = {(info["tp_rank"], info["tp_size"]) for _, rank in ranks for info in rank["parallelism_info"]}
        expected: dict[tuple[int, int], dict[str, str]] = {key: {} for key in shard}
        sources = {}
        for name, parts, checksums in expected_checksums(named_tensors, sorted(shard)):
            sources[name] = ", ".join(parts)
            for key, checksum in checksums.items():
                expected[key][name] = checksum
        for url, rank in ranks:
            info = rank["parallelism_info"][0]
            want, have = expected[info["tp_rank"], info["tp_size"]], rank["checksums"]
            for name in (*want, *(have.keys() - want.keys())):
                if want.get(name) == have.get(name):
                    continue
                what = ("differs from" if name in want and name in have else
                        "is missing there, unlike" if name in want else "is there, but not in")  # fmt: skip
                raise RunError(f"the weights of {url} are corrupted: {name} (from {sources.get(name, 'nothing')}) "
                               f"{what} the training engine's weights")  # fmt: skip

    def close(self) -> None:
        """Leave the process group, on both sides if that is still possible. Idempotent; raises nothing."""
        self.transport.disconnect()
        self.control.close()
