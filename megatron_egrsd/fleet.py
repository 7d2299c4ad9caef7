"""The SGLang servers of a run: every node's first rank launches its own, and the job's first rank speaks to all."""

import os
import secrets
from dataclasses import replace
from pathlib import Path

from megatron_egrsd.config import ModelConfig, RolloutConfig
from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.nodes import Nodes
from megatron_egrsd.rollout.process_group import address_towards
from megatron_egrsd.rollout.servers import RolloutServers


class Fleet:
    """Every rank makes the same calls. `servers` are all of them on the first rank, those of its own node on the first

    rank of another node, and None elsewhere. Those that the user started (`rollout.urls`) are the first rank's alone.
    """

    def __init__(self, config: RolloutConfig, model: ModelConfig, nodes: Nodes):
        self.config, self.model, self.nodes = config, model, nodes
        self.servers: RolloutServers | None = None

    def start(self, seed: int, log_directory: Path) -> None:
        """Launch `config.engines` servers on every node, or attach to `config.urls`, and await their health.

        Servers of several nodes listen on an address of theirs that the first node reaches. A key that is made here
        keeps others out, unless `config.api_key_variable` names one.

        Raises:
            BadArgument, RunError: On every rank, as RolloutServers says; `close` ends what was started.
        """
        first = self.nodes.index == 0
        if self.config.urls:

            def attach() -> None:
                self.servers = RolloutServers(self.config, self.model, seed, log_directory)

            on_first_rank(attach)
            return
        several = len(self.nodes) > 1
        key = on_first_rank(lambda: secrets.token_hex(16)) if several and not self.config.api_key_variable else ""

        def launch() -> list[str]:
            node, config, logs = self.nodes.index, self.config, log_directory
            if node > 0:
                towards = f"http://{os.environ['MASTER_ADDR']}"
                config, logs = replace(config, host=address_towards(towards)), logs / f"node-{node}"
            # Or all nodes would sample the same.
            self.servers = RolloutServers(config, self.model, (seed + 10_007 * node) % 2**31, logs, key=key)
            return self.servers.urls

        launched = self.nodes.each(launch)
        if first:
            self.servers.attach([url for urls in launched[1:] for url in urls])

    def recover(self) -> None:
        """Await the health of every lost server; those of other nodes are started again by now at the latest."""
        if due := on_first_rank(lambda: self.servers.take_due()):
            self.nodes.each(lambda: self.servers.restart(due))
        on_first_rank(lambda: self.servers.recover())

    def close(self) -> None:
        """End what this node launched. Not collective; idempotent."""
        if self.servers is not None:
            self.servers.close()
