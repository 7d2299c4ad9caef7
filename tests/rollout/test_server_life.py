"""Servers start, fail and end as they should, and never stay behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from megatron_egrsd.config import ModelConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout import servers as servers_module
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.scratch import Scratch
from megatron_egrsd.rollout.servers import RolloutServers, Server
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.processes import abandoned, shared_memory
from tests.rollout.conftest import (
    START_TIMEOUT,
    load_hf,
    named_tensors,
    processes_of_group,
    rollout_config,
    servers_config,
    wait_until,
)

pytestmark = pytest.mark.timeout(START_TIMEOUT + 60)

# A trainer reduced to its servers. Prints the group of its server; `wait` is "" until the server is healthy.
TRAINER = """
import sys, time
from pathlib import Path
from megatron_egrsd.config import ModelConfig
from megatron_egrsd.rollout.servers import RolloutServers
from tests.rollout.conftest import servers_config
with RolloutServers(servers_config(), ModelConfig(sys.argv[1], "float32"), 0, Path(sys.argv[2]), wait=False) as servers:
    print(servers.servers[0].process.pid, flush=True)
    servers.await_health()
    print("healthy", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def trainer(model_directory, tmp_path):
    """(process, group of its server, reader of its output); both are ended by id after the test."""
    process = subprocess.Popen([sys.executable, "-c", TRAINER, model_directory, tmp_path], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    group = int(process.stdout.readline())
    yield process, group
    process.kill()
    process.wait()
    process.stdout.close()
    for left in processes_of_group(group):
        left.kill()


def test_ctrl_c_during_the_start_leaves_nothing(trainer):
    process, group = trainer
    assert wait_until(lambda: len(processes_of_group(group)) >= 3, START_TIMEOUT)  # it has children
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert wait_until(lambda: not processes_of_group(group), 5), processes_of_group(group)


@pytest.mark.parametrize("moment", ["starting", pytest.param("healthy", marks=pytest.mark.slow)])
def test_sigkill_of_the_trainer_leaves_nothing(moment, request):
    before = shared_memory()
    process, group = request.getfixturevalue("trainer")
    if moment == "healthy":
        assert process.stdout.readline() == "healthy\n"
        assert len(processes_of_group(group)) >= 3
    assert wait_until(lambda: shared_memory() - before, START_TIMEOUT)  # the server creates it while it starts
    process.kill()
    assert wait_until(lambda: not processes_of_group(group), 5), processes_of_group(group)
    Scratch().remove()  # what the next run does
    assert not abandoned(shared_memory() - before)


def test_a_dying_server_is_noticed_and_close_leaves_nothing(model, tmp_path):
    config = rollout_config(servers_config(request_timeout=120.0, max_restarts=0))
    with RolloutServers(config.servers, model, 0, tmp_path) as servers:
        server = servers.servers[0]
        group = server.process.pid
        sync = WeightSync(servers, config.sync, "cpu")
        scheduler = next(p for p in processes_of_group(group) if "scheduler" in " ".join(p.cmdline()))
        threading.Timer(1.0, os.kill, (scheduler.pid, signal.SIGKILL)).start()
        start = time.monotonic()
        with pytest.raises(RunError, match=rf"{server.url} has ended .*sglang-0\.log.*gives up after 0 lost servers"):
            while True:  # generations until the scheduler is gone
                RolloutClient(servers, config).generate([[5, 6]] * 8, 8, max_new_tokens=400)
        assert time.monotonic() - start < 15
        start = time.monotonic()
        with pytest.raises(RunError):
            sync.push([], 1)
        sync.close()
        assert time.monotonic() - start < 10
    servers.close()  # idempotent
    assert not processes_of_group(group)


def test_a_server_that_dies_at_start_says_why(model, tmp_path):
    config = servers_config(args={"load_format": "no_such_format"})
    with pytest.raises(RunError, match=r"has ended \(exit code 2\): .*load-format.*invalid choice.*sglang-0\.log"):
        RolloutServers(config, model, 0, tmp_path)


@pytest.mark.parametrize("by", ["another program", "another run's server"])
def test_a_port_that_is_taken_after_it_was_chosen(by, servers, model, tmp_path, monkeypatch, capsys):
    """Another run's server is healthy on that port, and has other weights."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if by == "another program" else int(servers.urls[0].rpartition(":")[2])
        choices = iter([[port]])
        choose = servers_module.choose_ports
        monkeypatch.setattr(servers_module, "choose_ports", lambda *a: next(choices, None) or choose(*a))
        with RolloutServers(servers_config(), model, 0, tmp_path) as own:
            assert f":{port}" not in own.urls[0] and own.restarts == 0
            assert len(RolloutClient(own, rollout_config()).generate([[5, 6]], 2)[0]) == 2
    assert f"http://127.0.0.1:{port} was taken before the SGLang server used it" in capsys.readouterr().out


def test_an_address_of_ipv6(model, model_directory, tmp_path):
    config = rollout_config(servers_config(host="::1"))
    with RolloutServers(config.servers, model, 0, tmp_path) as servers:
        assert servers.urls[0].startswith("http://[::1]:")
        with contextlib.closing(WeightSync(servers, config.sync, "cpu")) as sync:
            sync.push(named_tensors(load_hf(model_directory)), 4)
        [answers] = RolloutClient(servers, config).generate([[5, 6]], 2)
        assert [answer.weight_version for answer in answers] == [4, 4]


@pytest.mark.parametrize("stranger, key", [((200, 200), "k"), ((401, 401), "k"), ((401, 200), "k"), ((200, 200), "")])
def test_a_launched_server_is_known_by_its_key(stranger, key):
    """`stranger`: what /model_info answers without a key, and with that of this run."""
    server = Server("http://127.0.0.1:1", elsewhere=True)

    def answer(request: httpx.Request) -> httpx.Response:
        asked = request.headers["Authorization"] == "Bearer k"
        return httpx.Response(200 if request.url.path == "/health" else stranger[asked])

    with httpx.Client(transport=httpx.MockTransport(answer), headers={"Authorization": "Bearer k"}) as http:
        assert servers_module._is_healthy(http, server, key) == (stranger == (401, 200) or not key)
        server.elsewhere = False  # the user's
        assert servers_module._is_healthy(http, server, key)


def test_start_timeout(model, tmp_path):
    with pytest.raises(
        RunError, match=r"not healthy within 0.5 s \(rollout.servers.start_timeout\); see .*sglang-0\.log"
    ):
        RolloutServers(servers_config(start_timeout=0.5), model, 0, tmp_path)


def test_missing_model_and_busy_port_start_nothing(model, tmp_path):
    with pytest.raises(BadArgument, match=r"model.path is '/no/such/model', but there is no config.json"):
        RolloutServers(servers_config(), ModelConfig("/no/such/model"), 0, tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadArgument, match=rf"port {port} on 127.0.0.1 cannot be used"):
            RolloutServers(servers_config(port=port), model, 0, tmp_path)
    assert not list(tmp_path.iterdir())
