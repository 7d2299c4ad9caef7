"""The SGLang servers of a run: every node's first rank launches its own, and rank 0 speaks to all of them."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_egrsd.config import ModelConfig, RolloutConfig, ServersConfig
from megatron_egrsd.engine.distributed import on_first_rank, on_first_rank_while
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.fleet.nodes import Nodes
from megatron_egrsd.hf.adapter_file import peft_config
from megatron_egrsd.rollout.ports import server_url
from megatron_egrsd.rollout.process_group import address_towards
from megatron_egrsd.rollout.server_command import first_gpu, lora_arguments, with_arguments
from megatron_egrsd.rollout.servers import RolloutServers, api_key
from megatron_egrsd.rollout.transports import TRANSPORTS, NamedTensors
from megatron_egrsd.rollout.weight_sync import WeightSync
from megatron_egrsd.system import torchrun


class Fleet:
    """Servers, and the weights that they get. Every rank makes the same calls.

    `servers` holds all servers on rank 0, its own on the first rank of another node, and is None on all other ranks.
    Servers that the user started (`rollout.servers.urls`) are known to rank 0 alone.

    Logs go into `output`/logs. One node waits `timeout` seconds for another.
    """

    def __init__(self, config: RolloutConfig, model: ModelConfig, engine: Engine, output: Path, timeout: float):
        self.config, self.model, self.engine, self.output = config, model, engine, output
        self.nodes = Nodes(timeout)
        self.by_node = TRANSPORTS[config.sync.transport].only_here  # each node's first rank sends to its own servers
        # The content of adapter_config.json if the servers get adapters, None if they get weights.
        by_sglang = engine.adapter is not None and config.sync.lora == "adapter"
        self.adapter = peft_config(engine.adapter, model.path) if by_sglang else None
        self.servers: RolloutServers | None = None
        self.sync: WeightSync | None = None
        self.version: int | None = None  # of the last push

    def start(self, seed: int) -> None:
        """Launch `engines` servers on every node, or attach to `rollout.servers.urls`, and await their health.

        On several nodes each server listens on the address of its node that the first node reaches. All launched
        servers have one key.

        Raises the errors of RolloutServers, on every rank; `close` ends servers that were started.
        """
        config, logs = self._server_settings(), self.output / "logs"
        key = on_first_rank(lambda: api_key(config))

        def launch() -> list[str]:
            node, own, directory = self.nodes.index, config, logs
            if node > 0:
                host = address_towards(server_url(*torchrun.master()))
                own, directory = replace(config, host=host), logs / f"node-{node}"
            # Or all nodes would sample the same.
            self.servers = RolloutServers(own, self.model, (seed + 10_007 * node) % 2**31, directory, key=key)
            return self.servers.urls

        launched = [on_first_rank(launch)] if config.urls else self.nodes.each(launch)
        if self.nodes.index == 0:
            self.servers.attach([url for urls in launched[1:] for url in urls])

        def connect() -> None:
            self.sync = WeightSync(self.servers, self.config.sync, self.engine.device, self.output, self.adapter)

        if self.by_node:
            self.nodes.each(connect)
        else:
            on_first_rank(connect)

    def push(self, version: int) -> None:
        """Send the engine's weights to every server; compare them there if `rollout.sync.verify` is set.

        With adapters, servers that have the weights of the last push get those that have changed since, or the adapters
        alone (`rollout.sync.lora`).

        Raises ServersLost if a server did not get them: call `mark_lost` and `recover`, and try again. Raises RunError
        if a server refused, cannot be started again, or holds other weights.
        """
        abandoned = on_first_rank(lambda: self.servers.abandoned)  # only rank 0 knows
        if self.servers is not None:
            self.servers.abandoned = abandoned
        if self.adapter:
            self._send(lambda tensors: self.sync.push(tensors, version), self.engine.export_adapter)
            return
        export = functools.partial(self.engine.export_weights, adapted_only=self._hold_the_rest())
        self._send(lambda weights: self.sync.push(weights, version), export)
        self.version = version
        if self.config.sync.verify:
            self._send(lambda weights: self.sync.verify(weights), self.engine.export_weights)

    def _send(self, receive: Callable[[NamedTensors], object], export: Callable[..., Iterator]) -> None:
        """Stream what the engine exports to `receive` on rank 0; if `by_node`, on the first rank of every node."""
        if self.by_node:
            tensors = self.nodes.share(export(placeholders=True), self.engine.device, self.config.sync.bucket_mib << 20)
            self.nodes.each_while(receive, tensors)
        else:
            on_first_rank_while(receive, export())

    def _server_settings(self) -> ServersConfig:
        """Return `rollout.servers`, with the first GPU, and the arguments that adapters and routing replay need."""
        arguments = {}
        if self.engine.device.type == "cuda":
            ranks, count = torchrun.local_world_size(), torch.cuda.device_count()
            arguments["base_gpu_id"] = first_gpu(self.config.servers, ranks, count)
        if self.adapter:
            spec, device = self.engine.adapter, self.engine.device.type
            arguments |= lora_arguments(spec.rank, spec.targets, device)
        return with_arguments(self.config, **arguments)

    def _hold_the_rest(self) -> bool:
        """Return whether the servers have all weights of the last push, so that those with adapters are enough.

        Colocated servers have given them up, and one that was started again serves another version.
        """
        version = self.version
        if version is None or self.engine.adapter is None or self.config.servers.colocated:
            return False
        if self.by_node:
            return all(self.nodes.each(lambda: self.sync.serves(version)))
        return on_first_rank(lambda: self.sync.serves(version))

    def mark_lost(self, reason: str) -> None:
        """Count all servers as lost: a push in which one did not take part leaves the others half done."""
        on_first_rank(lambda: self.servers.mark_all_lost(reason))

    def recover(self) -> None:
        """Await the health of every lost server; start those of other nodes again."""
        if due := on_first_rank(lambda: self.servers.take_due()):
            self.nodes.each(lambda: self.servers.restart(due))
        on_first_rank(lambda: self.servers.recover())

    def close(self) -> None:
        """End the servers and connections of this rank. Not collective; idempotent."""
        for part in (self.sync, self.servers):
            if part is not None:
                part.close()
