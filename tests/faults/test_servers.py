"""Servers are killed and frozen at random moments of generation and of a weight push.

Every trial must end with all responses, all of them from the weights that were pushed last.
"""

import os
import signal
import threading
import time

import pytest
import torch

from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.rollout.conftest import (
    START_TIMEOUT,
    largest_difference,
    load_hf,
    named_tensors,
    processes_of_group,
    rollout_config,
    servers_config,
)

PROMPTS = [[5 + i] * (1 + i) for i in range(8)]
HEALTH_TIMEOUT = 25.0  # SGLang itself takes 20 s to say that its scheduler is silent


class Fleet:
    """Servers with a client and a weight sync, used as run/rollout_source.py does."""

    def __init__(self, model, model_directory, logs, engines: int, **overrides):
        self.config = rollout_config(servers_config(engines=engines, health_timeout=HEALTH_TIMEOUT, **overrides))
        self.servers = RolloutServers(self.config.servers, model, 0, logs)
        self.sync = WeightSync(self.servers, self.config.sync, "cpu")
        self.client = RolloutClient(self.servers, self.config)
        self.hf = load_hf(model_directory)
        self.version = 0
        self.lost = 0  # times that no server was left

    def push(self, version: int) -> None:
        """Push weights that differ from the initial ones, so that a server with old weights is detected."""
        while True:
            try:
                generator = torch.Generator().manual_seed(version)
                with torch.no_grad():
                    for p in self.hf.parameters():
                        p.copy_(torch.randn(p.shape, generator=generator) * 0.05 + (p.dim() == 1))
                self.sync.push(named_tensors(self.hf), version)
                self.version = version
                return
            except ServersLost:
                self.lost += 1

    def generate(self, n: int) -> list:
        done: dict = {}
        while True:
            try:
                answers = self.client.generate(PROMPTS, n, done=done)
                break
            except ServersLost:
                self.lost += 1
                self.push(self.version)
        assert [len(group) for group in answers] == [n] * len(PROMPTS)
        assert {a.weight_version for group in answers for a in group} == {self.version}
        assert largest_difference(self.hf, PROMPTS, answers, 1.0) < 1e-5
        return answers

    def close(self) -> None:
        self.sync.close()
        self.servers.close()


def strike(fleet: Fleet, fault: str, server) -> None:
    group = server.process.pid
    if fault.endswith("scheduler"):
        victims = [p.pid for p in processes_of_group(group) if "scheduler" in " ".join(p.cmdline())]
    elif fault.endswith("server"):
        victims = [group]
    else:
        victims = [p.pid for p in processes_of_group(group)]
    for pid in victims:
        os.kill(pid, signal.SIGSTOP if fault.startswith("freeze") else signal.SIGKILL)


def trial(fleet: Fleet, fault: str, phase: str, delay: float, victim: int) -> None:
    """Inject `fault` `delay` seconds after the start of a generation or a push; both must work afterwards."""
    restarts, version = fleet.servers.restarts, fleet.version + 1
    server = fleet.servers.servers[victim]
    struck = threading.Event()

    def run() -> None:
        time.sleep(delay)
        strike(fleet, fault, server)
        struck.set()

    threading.Thread(target=run, daemon=True).start()
    rounds = 0
    while not struck.is_set() or rounds == 0:
        if phase == "push":
            fleet.push(version + rounds)
        else:
            fleet.generate(8)
        rounds += 1
    fleet.generate(4)
    fleet.push(fleet.version + 1)
    fleet.generate(2)
    assert fleet.servers.restarts > restarts
    assert not any(s.lost for s in fleet.servers.servers)


@pytest.fixture(scope="module")
def pair(model, model_directory, tmp_path_factory):
    fleet = Fleet(model, model_directory, tmp_path_factory.mktemp("logs"), engines=2, max_restarts=100)
    yield fleet
    groups = [s.process.pid for s in fleet.servers.servers]
    fleet.close()
    assert not any(processes_of_group(group) for group in groups)


@pytest.mark.slow
@pytest.mark.timeout(3 * START_TIMEOUT)
def test_one_of_two_servers_dies_and_the_other_carries_on(pair):
    pair.push(pair.version + 1)
    lost = pair.lost
    trial(pair, "kill scheduler", "generate", 0.1, 0)
    assert pair.lost == lost  # a server was always left


@pytest.mark.timeout(4 * START_TIMEOUT)
def test_the_only_server_dies_and_comes_back_with_the_current_weights(model, model_directory, tmp_path):
    fleet = Fleet(model, model_directory, tmp_path, engines=1, max_restarts=1)
    try:
        fleet.push(3)
        trial(fleet, "kill all", "generate", 0.2, 0)
        assert fleet.lost >= 1
        strike(fleet, "kill all", fleet.servers.servers[0])
        with pytest.raises(RunError, match=r"has ended .* the run gives up after 1 lost servers"):
            fleet.client.generate(PROMPTS, 1)
    finally:
        fleet.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_faults_at_random_moments(pair, chance):
    trials = int(os.environ.get("FAULT_TRIALS", "12"))
    pair.push(pair.version + 1)
    for number in range(trials):
        kinds = ["kill scheduler", "kill server", "kill all", "freeze scheduler", "freeze all"]
        fault, phase = chance.choice(kinds), chance.choice(["generate", "push"])
        delay, victim = chance.uniform(0, 0.6), chance.randrange(2)
        started = time.monotonic()
        trial(pair, fault, phase, delay, victim)
        print(f"trial {number}: {fault}, {delay:.2f} s into a {phase}: recovered in {time.monotonic() - started:.0f} s")
