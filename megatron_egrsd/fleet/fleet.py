"""The SGLang servers of a run: every node's first rank launches its own, and the job's first rank speaks to all."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_egrsd.config import Config
from megatron_egrsd.engine.distributed import on_first_rank, on_first_rank_while
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.fleet.nodes import Nodes
from megatron_egrsd.rollout.process_group import address_towards
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import NamedTensors, WeightSync
from megatron_egrsd.system import torchrun


class Fleet:
    """Servers, and the weights that they get. Every rank makes the same calls.

    `servers` are all of them on the first rank, on the first rank of another node its own, and None on all others.
    Those that the user started (`rollout.urls`) are the first rank's alone.
    """

    def __init__(self, config: Config, engine: Engine):
        self.config, self.engine, self.nodes = config, engine, Nodes(config.parallel.timeout)
        self.output = Path(config.output)
        self.servers: RolloutServers | None = None
        self.sync: WeightSync | None = None

    def start(self, seed: int) -> None:
        """Launch `rollout.engines` servers on every node, or attach to `rollout.urls`, and await their health.

        Servers of several nodes listen on an address of theirs that the first node reaches. A key that is made here
        keeps others out, unless `rollout.api_key_variable` names one.

        Raises:
            BadArgument, RunError: On every rank, as RolloutServers says; `close` ends what was started.
        """
        config, logs = self.config.rollout, self.output / "logs"
        several = len(self.nodes) > 1 and not config.urls
        key = on_first_rank(lambda: secrets.token_hex(16)) if several and not config.api_key_variable else ""

        def launch() -> list[str]:
            node, own, directory = self.nodes.index, config, logs
            if node > 0:
                host = address_towards(f"http://{torchrun.master()[0]}")
                own, directory = replace(config, host=host), logs / f"node-{node}"
            # Or all nodes would sample the same.
            self.servers = RolloutServers(own, self.config.model, (seed + 10_007 * node) % 2**31, directory, key=key)
            return self.servers.urls

        launched = [on_first_rank(launch)] if config.urls else self.nodes.each(launch)
        if self.nodes.index == 0:
            self.servers.attach([url for urls in launched[1:] for url in urls])

        def connect() -> None:
            self.sync = WeightSync(self.servers, config, self.engine.device, self.output)

        if config.weight_sync == "ipc":
            self.nodes.each(connect)
        else:
            on_first_rank(connect)

    def push(self, version: int) -> None:
        """The engine's weights into every server, compared there where `rollout.verify_sync` says so.

        Raises:
            ServersLost: A server did not get them; `mark_lost`, `recover` and once more.
            RunError: A server refused, cannot be started again, or holds other weights.
        """
        abandoned = on_first_rank(lambda: self.servers.abandoned)  # it alone knows
        if self.servers is not None:
            self.servers.abandoned = abandoned
        self._send(lambda weights: self.sync.push(weights, version))
        if self.config.rollout.verify_sync:
            self._send(lambda weights: self.sync.verify(weights))

    def _send(self, receive: Callable[[NamedTensors], object]) -> None:
        """The weights to `receive` on the first rank; where they are handed over by handle, on that of every node."""
        rollout = self.config.rollout
        if rollout.weight_sync == "ipc":
            weights = self.engine.export_weights(placeholders=True)
            weights = self.nodes.share(weights, self.engine.device, rollout.sync_bucket_mib << 20)
            self.nodes.each_while(receive, weights)
        else:
            on_first_rank_while(receive, self.engine.export_weights())

    def mark_lost(self, reason: str) -> None:
        """All servers: what one did not take part in leaves the others half done."""
        on_first_rank(lambda: self.servers.mark_all_lost(reason))

    def recover(self) -> None:
        """Await the health of every lost server; those of other nodes are started again by now at the latest."""
        if due := on_first_rank(lambda: self.servers.take_due()):
            self.nodes.each(lambda: self.servers.restart(due))
        on_first_rank(lambda: self.servers.recover())

    def close(self) -> None:
        """End what this rank started. Not collective; idempotent."""
        for part in (self.sync, self.servers):
            if part is not None:
                part.close()
