"""The SGLang servers of a run: every node's first rank launches its own, and rank 0 speaks to all of them."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_egrsd.config import ModelConfig, RolloutConfig
from megatron_egrsd.engine.distributed import on_first_rank, on_first_rank_while
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.fleet.nodes import Nodes
from megatron_egrsd.rollout.process_group import address_towards
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.transports import NamedTensors
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
        self.servers: RolloutServers | None = None
        self.sync: WeightSync | None = None

    def start(self, seed: int) -> None:
        """Launch `engines` servers on every node, or attach to `rollout.servers.urls`, and await their health.

        On several nodes each server listens on the address of its node that the first node reaches. A key that is made
        here keeps others out, unless `rollout.servers.api_key_variable` names one.

        Raises the errors of RolloutServers, on every rank; `close` ends servers that were started.
        """
        config, logs = self.config.servers, self.output / "logs"
        several = len(self.nodes) > 1 and not config.urls
        key = on_first_rank(lambda: secrets.token_hex(16)) if several and not config.api_key_variable else ""

        def launch() -> list[str]:
            node, own, directory = self.nodes.index, config, logs
            if node > 0:
                host = address_towards(f"http://{torchrun.master()[0]}")
                own, directory = replace(config, host=host), logs / f"node-{node}"
            # Or all nodes would sample the same.
            self.servers = RolloutServers(own, self.model, (seed + 10_007 * node) % 2**31, directory, key=key)
            return self.servers.urls

        launched = [on_first_rank(launch)] if config.urls else self.nodes.each(launch)
        if self.nodes.index == 0:
            self.servers.attach([url for urls in launched[1:] for url in urls])

        def connect() -> None:
            self.sync = WeightSync(self.servers, self.config.sync, self.engine.device, self.output)

        if self.config.sync.transport == "ipc":
            self.nodes.each(connect)
        else:
            on_first_rank(connect)

    def push(self, version: int) -> None:
        """Send the engine's weights to every server; compare them there if `rollout.sync.verify` is set.

        Raises ServersLost if a server did not get them: call `mark_lost` and `recover`, and try again. Raises RunError
        if a server refused, cannot be started again, or holds other weights.
        """
        abandoned = on_first_rank(lambda: self.servers.abandoned)  # only rank 0 knows
        if self.servers is not None:
            self.servers.abandoned = abandoned
        self._send(lambda weights: self.sync.push(weights, version))
        if self.config.sync.verify:
            self._send(lambda weights: self.sync.verify(weights))

    def _send(self, receive: Callable[[NamedTensors], object]) -> None:
        """Stream the weights to `receive` on rank 0; by "ipc", on the first rank of every node."""
        if self.config.sync.transport == "ipc":
            weights = self.engine.export_weights(placeholders=True)
            weights = self.nodes.share(weights, self.engine.device, self.config.sync.bucket_mib << 20)
            self.nodes.each_while(receive, weights)
        else:
            on_first_rank_while(receive, self.engine.export_weights())

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
