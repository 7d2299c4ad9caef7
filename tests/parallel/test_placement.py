"""Colocated ranks and servers hand memory over: nobody takes it before every rank, or every server, has given it up."""

import time
from types import SimpleNamespace

import torch.distributed as dist

from megatron_egrsd.config import ModelConfig, ServersConfig
from megatron_egrsd.rollout.server_memory import ServerMemory
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from tests.ranks import run_ranks

SLOW = 0.5  # seconds


def _phases(rank, world_size):
    """Return (what, begin, end) of each step of this rank through the phases; the clock is the host's."""
    from megatron_egrsd.fleet.colocation import Colocated
    from megatron_egrsd.fleet.nodes import Nodes

    steps = []

    def step(name: str, seconds: float = 0.0) -> None:
        begin = time.monotonic()
        time.sleep(seconds)
        steps.append((name, begin, time.monotonic()))

    dist.init_process_group("gloo")
    engine = SimpleNamespace(
        offload=lambda keep_weights=False: step("offload", SLOW * rank),
        reload=lambda only_weights=False: step("reload"),
    )
    close = lambda: step("close", 0.0 if rank else SLOW)  # noqa: E731
    placement = Colocated(SimpleNamespace(engine=engine, nodes=Nodes(60), close=close))
    step("start of the servers")
    placement.memory = SimpleNamespace(resume=lambda *_: step("resume"))
    placement.phase = "training"
    for phase in ("transfer", "sampling", "end"):
        placement.enter(phase)
    dist.destroy_process_group()
    return steps


def test_memory_is_taken_after_every_rank_and_every_server_has_given_it_up():
    first, second = run_ranks(_phases, 2, timeout=60)
    taken = [begin for name, begin, _ in first if name in ("start of the servers", "resume")]
    given = [end for name, _, end in second if name == "offload"]
    assert len(taken) == len(given) == 3
    assert all(begin >= end for begin, end in zip(taken, given, strict=True))
    [closed] = [end for name, _, end in first if name == "close"]
    reloaded = [begin for name, begin, _ in first + second if name == "reload"]
    assert len(reloaded) == 2 and min(reloaded) >= closed


class Servers(RolloutServers):
    """Servers of the user, which answer again once somebody has awaited their health."""

    def await_health(self, servers=None):
        self.awaited = [server.url for server in servers]


def _train_while_one_starts_again(rank, world_size):
    """Return (losses of servers, those that were never lost) after the ranks have taken the memory."""
    from megatron_egrsd.fleet.colocation import Colocated

    dist.init_process_group("gloo")
    config = ServersConfig(urls=["http://a:1", "http://b:1"])
    servers = Servers(config, ModelConfig("m"), 0, None, wait=False)
    servers.awaited = []

    def on_all(*_):
        if any(server.lost and server.url not in servers.awaited for server in servers.servers):
            raise ServersLost("connection refused")

    control = SimpleNamespace(servers=servers, start_clock=lambda: None, await_idle=lambda: None, on_all=on_all)
    engine = SimpleNamespace(offload=lambda keep_weights=False: None, reload=lambda: None)
    placement = Colocated(SimpleNamespace(engine=engine, recover=servers.recover))
    placement.memory = ServerMemory(control)
    servers.mark_lost(servers.servers[:1], "a hangs")
    placement.enter("training")
    dist.destroy_process_group()
    return servers.restarts, [server.url for server in servers.live]


def test_a_server_that_starts_again_is_awaited_and_the_healthy_one_lives():
    assert run_ranks(_train_while_one_starts_again, 1, timeout=60) == [(1, ["http://b:1"])]
