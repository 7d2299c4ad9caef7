"""The student's weights, from the first training rank into every SGLang server.

One sync is: begin_weight_update on every server; for each bucket a request that announces names, types and shapes,
and one broadcast of the flattened bytes; end_weight_update; then the new version, which every server must report.
Or, with `weight_sync: disk`, the same through a temporary checkpoint. Whatever can wait has a deadline.
"""

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from megatron_egrsd.config import RolloutConfig
from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.process_group import BroadcastGroup, address_towards
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.rollout.weight_checksums import expected_checksums

NamedTensors = Iterable[tuple[str, torch.Tensor]]
_numbers = itertools.count()  # a group that was abandoned may still be ending when the next one forms


class WeightSync:
    """Pushes weights to the servers and checks that they arrived. Used by one process, with no generation running.

    A failed push leaves the servers with a mixture of old and new weights: those we launched are started anew, and the
    next push, of the same weights, awaits them first.

    Args:
        servers: Receivers; they must all run the same model.
        config: Transport, bucket size and timeout.
        device: Where the tensors are when they are sent: CUDA broadcasts over NCCL, CPU over gloo.
        output_directory: Parent of the temporary checkpoint of the disk transport (servers must see it too);
            None takes the system's temporary directory.
    """

    def __init__(self, servers: RolloutServers, config: RolloutConfig, device: torch.device | str,
                 output_directory: Path | None = None):  # fmt: skip
        self.servers = servers
        self.config = config
        self.device = torch.device(device)
        self.output_directory = output_directory
        self._http = httpx.Client(timeout=config.sync_timeout, trust_env=False, headers=servers.headers)
        self._threads = ThreadPoolExecutor(len(servers.urls), thread_name_prefix="weight-sync")
        self._group: BroadcastGroup | None = None
        self._start_clock()
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
        start = self._start_clock()
        try:
            self._connect()
            if self._group is not None:
                self._push_by_broadcast(named_tensors)
            else:
                self._push_by_disk(named_tensors)
            self._on_all("update_weight_version", {"new_version": str(version), "abort_all_requests": False})
            self.check_version(version)
        except ServersLost as lost:
            for server in self.servers.servers:
                self.servers.mark_lost(server, str(lost))
            raise
        self.servers.rejoin()
        return time.monotonic() - start

    def check_version(self, version: int) -> None:
        """RunError naming a server that does not serve weight version `version`."""
        for url in self.servers.urls:
            served = self._request("GET", url, "model_info")["weight_version"]
            if served != str(version):
                raise RunError(f"{url} serves weight version {served!r} instead of {version}")

    def verify(self, named_tensors: NamedTensors) -> None:
        """Compare every weight that the servers hold with `named_tensors`, bit by bit, by checksums.

        Raises:
            RunError: Naming the first tensor that differs, is missing or is unexpected, and the server.
        """
        self._start_clock()
        answers = self._on_all("weights_checker", {"action": "checksum"})
        ranks = [(url, rank) for url, answer in zip(self.servers.urls, answers, strict=True)
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
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _disconnect(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # First the servers' ends: it also ends a broadcast that was abandoned, which our end would wait for.
            for url in self.servers.urls:
                with suppress(httpx.HTTPError):  # a server that is ending takes its end along
                    self._http.post(f"{url}/destroy_weights_update_group", json={"group_name": group.name}, timeout=5)
            group.close()

    def _connect(self) -> None:
        """Form the process group with all servers, if the transport needs one and there is none."""
        if self.config.weight_sync == "distributed" and self._group is None:
            self._group = self._form_group()

    def _form_group(self) -> BroadcastGroup:
        sizes = [self._request("GET", url, "server_info")["tp_size"] for url in self.servers.urls]
        # One address for all servers: where one is elsewhere, not this host's loopback.
        address = max(map(address_towards, self.servers.urls), key=lambda a: not a.startswith("127."))
        name = f"megatron_egrsd_weights_{next(_numbers)}"
        group = BroadcastGroup(name, address, 1 + sum(sizes), self.device, self.config.sync_timeout)
        bodies = [{"master_address": address, "master_port": group.port, "rank_offset": 1 + sum(sizes[:i]),
                   "world_size": group.world_size, "group_name": name, "backend": group.backend}
                  for i in range(len(sizes))]  # fmt: skip
        self._on_all("init_weights_update_group", bodies, meanwhile=lambda check: group.join())
        return group

    def _push_by_broadcast(self, named_tensors: NamedTensors) -> None:
        self._on_all("begin_weight_update", {})
        for bucket in buckets(named_tensors, self.config.sync_bucket_mib << 20):
            flat = torch.cat([t.detach().to(self.device).contiguous().view(-1).view(torch.uint8) for _, t in bucket])
            announcement = {
                "names": [name for name, _ in bucket],
                "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
                "shapes": [list(t.shape) for _, t in bucket],
                "group_name": self._group.name,
                "load_format": "flattened_bucket",
                "flush_cache": True,  # the KV cache belongs to the old weights
            }
            send = partial(self._group.broadcast, flat, self._deadline)
            self._on_all("update_weights_from_distributed", announcement, meanwhile=send)
        self._on_all("end_weight_update", {})

    def _push_by_disk(self, named_tensors: NamedTensors) -> None:
        from safetensors.torch import save_file

        if self.output_directory is not None:
            self.output_directory.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(prefix="weight-sync-", dir=self.output_directory)
        try:
            for i, bucket in enumerate(buckets(named_tensors, self.config.sync_bucket_mib << 20)):
                tensors = {name: t.detach().cpu().contiguous() for name, t in bucket}
                save_file(tensors, f"{directory}/model-{i:05d}.safetensors", {"format": "pt"})
            self._on_all("update_weights_from_disk", {"model_path": directory, "flush_cache": True})
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _start_clock(self) -> float:
        now = time.monotonic()
        self._deadline = now + self.config.sync_timeout
        return now

    def _on_all(self, endpoint: str, body: dict | list[dict],
                meanwhile: Callable[[Callable[[], None]], None] | None = None) -> list[dict[str, Any]]:  # fmt: skip
        """POST to every server at once, and run `meanwhile` until they answer; the first failure is raised.

        `meanwhile` is given a function that raises when a request has failed: then nobody will take part.
        """
        bodies = body if isinstance(body, list) else [body] * len(self.servers.urls)
        requests = [self._threads.submit(self._request, "POST", url, endpoint, b)
                    for url, b in zip(self.servers.urls, bodies, strict=True)]  # fmt: skip
        if meanwhile is not None:
            try:
                meanwhile(lambda: _raise_failed(requests))
            except RunError as error:
                wait(requests, timeout=1.0)  # a refusal explains more than the broadcast that it broke
                _raise_failed(requests)
                self._check_alive()
                raise ServersLost(str(error)) from error
        while wait(requests, timeout=0.2).not_done:
            _raise_failed(requests)
            self._check_alive()
        return [request.result() for request in requests]

    def _check_alive(self) -> None:
        try:
            self.servers.check_alive()
        except RunError as error:
            raise ServersLost(str(error)) from None

    def _request(self, method: str, url: str, endpoint: str, body: dict | None = None) -> dict[str, Any]:
        remaining = self._deadline - time.monotonic()
        try:
            response = self._http.request(method, f"{url}/{endpoint}", json=body, timeout=max(0.1, remaining))
        except httpx.TimeoutException:
            raise ServersLost(f"{url}/{endpoint} did not answer within rollout.sync_timeout = "
                              f"{self.config.sync_timeout:g} s") from None  # fmt: skip
        except httpx.TransportError as error:
            reason = error or type(error).__name__
            raise ServersLost(f"{url}/{endpoint} failed: {reason}; is the server alive?") from error
        try:
            answer = response.json() if "json" in response.headers.get("content-type", "") else {}
        except ValueError:
            raise ServersLost(f"{url}/{endpoint} answered with something that is not JSON") from None
        if response.status_code != 200 or answer.get("success") is False:
            reason = answer.get("message") or response.text[:300]
            raise RunError(f"{url}/{endpoint} refused with HTTP {response.status_code}: {reason}")
        return answer


def buckets(named_tensors: NamedTensors, size: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
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


def _raise_failed(requests: list[Future]) -> None:
    for request in requests:
        if request.done():
            request.result()
