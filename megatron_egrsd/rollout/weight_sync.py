"""The student's weights, from the first training rank into every SGLang server.

One sync is: begin_weight_update on every server; for each bucket a request that announces names, types and shapes,
and one broadcast of the flattened bytes; end_weight_update; then the new version, which every server must report.
With `transport: ipc` a request holds handles instead, and the servers, on the same host, read the tensors where they
are; with `disk` they read a temporary checkpoint. Whatever can wait has a deadline.
"""

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_egrsd.config import SyncConfig
from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.process_group import BroadcastGroup, address_towards, is_local
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.rollout.tensor_handles import Bucket, flatten, share
from megatron_egrsd.rollout.weight_checksums import expected_checksums

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightSync:
    """Pushes weights to the servers and checks that they arrived. Used by one process, with no generation running.

    With `transport: ipc` the servers are those of this node, and every node has a process that does it.

    A failed push leaves the servers with a mixture of old and new weights: those we launched are started anew, and the
    next push, of the same weights, awaits them first.

    Args:
        servers: Receivers; they must all run the same model.
        config: Transport, bucket size and timeout.
        device: Where the tensors are when they are sent: CUDA broadcasts over NCCL, CPU over gloo.
        output_directory: Parent of the temporary checkpoint of the disk transport (servers must see it too);
            None takes the system's temporary directory.
    """

    def __init__(self, servers: RolloutServers, config: SyncConfig, device: torch.device | str,
                 output_directory: Path | None = None):  # fmt: skip
        self.servers = servers
        self.config = config
        self.device = torch.device(device)
        self.output_directory = output_directory
        self.control = Control(servers, config.timeout, only_here=config.transport == "ipc")
        self._group: BroadcastGroup | None = None
        # A run that was killed while it pushed left its session open in servers that outlive it.
        self.control.tell("end_weight_update", {}, timeout=5)
        try:
            self._connect()
        except RunError:
            self.close()
            raise

    def push(self, named_tensors: NamedTensors, version: int) -> float:
        """Send HF-named tensors (full, unsharded) to every server as `version`; returns the seconds it took.

        Servers that were lost before are awaited first. Afterwards every server counts again.

        Raises:
            ServersLost: A server died or hangs; push again, from the first tensor on.
            RunError: A server refused, or cannot be started again.
        """
        if any(server.lost for server in self.servers.servers):
            self.servers.recover()
            self._disconnect()
        start = self.control.start_clock()
        try:
            self._connect()
            self.control.await_idle()
            if self.config.transport == "disk":
                self._push_by_disk(named_tensors)
            else:
                self._push_by_bucket(named_tensors)
            self.control.on_all("update_weight_version", {"new_version": str(version), "abort_all_requests": False})
            self.check_version(version)
        except ServersLost as lost:
            self.servers.mark_all_lost(str(lost))
            raise
        self.servers.rejoin()
        return time.monotonic() - start

    def check_version(self, version: int) -> None:
        """RunError naming a server that does not serve weight version `version`."""
        for url in self.control.urls:
            served = self.control.request("GET", url, "model_info")["weight_version"]
            if served != str(version):
                raise RunError(f"{url} serves weight version {served!r} instead of {version}")

    def verify(self, named_tensors: NamedTensors) -> None:
        """Compare every weight that the servers hold with `named_tensors`, bit by bit, by checksums.

        Raises:
            RunError: Naming the first tensor that differs, is missing or is unexpected, and the server.
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
        """Leave the process group, on both sides where that is still possible. Idempotent; raises nothing."""
        self._disconnect()
        self.control.close()

    def _disconnect(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # First the servers' ends: it also ends a broadcast that was abandoned, which our end would wait for.
            self.control.tell("destroy_weights_update_group", {"group_name": group.name}, timeout=5)
            group.close()

    def _connect(self) -> None:
        """Whatever the transport needs and is not there yet: a process group with all servers, their sizes."""
        if self.config.transport == "distributed" and self._group is None:
            self._group = self._form_group()
        elif self.config.transport == "ipc":
            for url in self.control.urls:
                if not is_local(url):
                    raise RunError(f'rollout.sync.transport is "ipc", which hands over memory of this host, but {url} '
                                   'is another host; choose "distributed" or "disk"')  # fmt: skip
            self._sizes = self._tensor_parallel_sizes()

    def _tensor_parallel_sizes(self) -> list[int]:
        return [self.control.request("GET", url, "server_info")["tp_size"] for url in self.control.urls]

    def _form_group(self) -> BroadcastGroup:
        sizes = self._tensor_parallel_sizes()
        # One address for all servers: where one is elsewhere, not this host's loopback.
        address = max(map(address_towards, self.control.urls), key=lambda a: not a.startswith("127."))
        # A group that was abandoned, by a killed run or by ours, may still be there when the next one forms.
        name = f"megatron_egrsd_weights_{secrets.token_hex(4)}"
        group = BroadcastGroup(name, address, 1 + sum(sizes), self.device, self.config.timeout)
        bodies = [{"master_address": address, "master_port": group.port, "rank_offset": 1 + sum(sizes[:i]),
                   "world_size": group.world_size, "group_name": name, "backend": group.backend}
                  for i in range(len(sizes))]  # fmt: skip
        self.control.on_all("init_weights_update_group", bodies, meanwhile=lambda check: group.join())
        return group

    def _push_by_bucket(self, named_tensors: NamedTensors) -> None:
        self.control.on_all("begin_weight_update", {})
        send = self._broadcast if self.config.transport == "distributed" else self._hand_over
        for bucket in buckets(named_tensors, self.config.bucket_mib << 20):
            send(bucket)
        self.control.on_all("end_weight_update", {})

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

    def _hand_over(self, bucket: Bucket) -> None:
        handles, _buffer = share(bucket, self.device)  # the buffer lives until all servers have copied it
        # Every tensor-parallel rank opens the same tensors and keeps its part of them.
        bodies = [{"serialized_named_tensors": [handles] * size, "flush_cache": True} for size in self._sizes]
        self.control.on_all("update_weights_from_tensor", bodies)

    def _push_by_disk(self, named_tensors: NamedTensors) -> None:
        from safetensors.torch import save_file

        if self.output_directory is not None:
            self.output_directory.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(prefix="weight-sync-", dir=self.output_directory)
        try:
            for i, bucket in enumerate(buckets(named_tensors, self.config.bucket_mib << 20)):
                tensors = {name: t.detach().cpu().contiguous() for name, t in bucket}
                save_file(tensors, f"{directory}/model-{i:05d}.safetensors", {"format": "pt"})
            self.control.on_all("update_weights_from_disk", {"model_path": directory, "flush_cache": True})
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def buckets(named_tensors: NamedTensors, size: int) -> Iterator[Bucket]:
    """Consecutive tensors of one type, together at most `size` bytes; a larger tensor comes alone."""
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
