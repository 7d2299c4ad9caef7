"""Weight sync to a real server: weights arrive bit by bit, and every failure is reported in time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout import tensor_handles, transports
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.process_group import BroadcastGroup
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.rollout.conftest import (
    START_TIMEOUT,
    largest_difference,
    load_hf,
    named_tensors,
    rollout_config,
    servers_config,
    sync_config,
    wait_until,
)

pytestmark = pytest.mark.timeout(START_TIMEOUT + 100)
PROMPTS = [[7, 8, 9], [10] * 20, [11]]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sync(servers):
    with contextlib.closing(WeightSync(servers, sync_config(), "cpu")) as sync:
        yield sync


def changed(model_directory, seed: int):
    """The model after a made-up training step."""
    hf = load_hf(model_directory)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return hf


def test_new_weights_serve_the_next_rollouts(sync, client, model_directory):
    for version in (1, 2):
        hf = changed(model_directory, version)
        assert sync.push(named_tensors(hf), version) < 10
        sync.verify(named_tensors(hf))
        answers = client.generate(PROMPTS, 4, settings=rollout_config(temperature=0.9))
        assert {a.weight_version for group in answers for a in group} == {version}
        assert largest_difference(hf, PROMPTS, answers, 0.9) < 1e-5


def test_what_a_client_gave_up_does_not_keep_weights_out(servers, model_directory):
    """SGLang continues a request for a moment after its client has gone, and refuses weights meanwhile."""
    tensors = named_tensors(load_hf(model_directory))
    hasty = rollout_config(servers_config(request_timeout=0.05, request_retries=0, max_concurrent_requests=1000))
    impatient = RolloutClient(servers, hasty)
    sync = WeightSync(servers, sync_config(), "cpu")
    for version in (1, 2, 3):
        with pytest.raises(RunError, match="did not answer within"):
            impatient.generate(PROMPTS * 4, 32, max_new_tokens=400)
        sync.push(tensors, version)
    sync.close()


_PUSH_AND_DIE = """
import os, signal, sys
from pathlib import Path
from megatron_egrsd.rollout import transports
from megatron_egrsd.rollout.process_group import BroadcastGroup
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.rollout.conftest import load_hf, named_tensors, servers_config, sync_config

url, model, transport, when = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def one_by_one(tensors, size):
    for i, tensor in enumerate(tensors):
        if i == 10 and when == "between two buckets":
            die()
        yield [tensor]

transports.buckets = one_by_one
if when == "in a broadcast":
    BroadcastGroup.broadcast = die
servers = RolloutServers(servers_config(urls=[url]), None, 0, Path())
WeightSync(servers, sync_config(transport=transport), "cpu").push(named_tensors(load_hf(model)), 9)
"""


@pytest.mark.parametrize("transport, when", [("distributed", "in a broadcast"), ("ipc", "between two buckets")])
def test_a_run_that_was_killed_while_it_pushed_can_be_continued(servers, model_directory, transport, when):
    """The user's servers live on, with a session open and a group whose first rank is gone."""
    command = [sys.executable, "-c", _PUSH_AND_DIE, servers.urls[0], str(model_directory), transport, when]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=100).returncode == -signal.SIGKILL
    hf = changed(model_directory, 9)
    sync = WeightSync(servers, sync_config(transport=transport), "cpu")
    sync.push(named_tensors(hf), 9)
    sync.verify(named_tensors(hf))
    sync.close()


def test_disk_transport(servers, client, model_directory, tmp_path):
    hf = changed(model_directory, 3)
    disk = WeightSync(servers, sync_config(transport="disk"), "cpu", tmp_path)
    disk.push(iter(named_tensors(hf)), 3)
    disk.verify(named_tensors(hf))
    disk.close()
    assert not list(tmp_path.iterdir()), "the temporary checkpoint must not stay"
    assert largest_difference(hf, PROMPTS, client.generate(PROMPTS, 2), 1.0) < 1e-5


def test_handles_to_shared_memory(servers, client, model_directory, monkeypatch):
    """Nothing but names and addresses goes through HTTP, and no shared memory stays behind."""
    before, bodies = shared_memory(), []
    request = Control.request
    monkeypatch.setattr(Control, "request", lambda self, *a: bodies.append(str(a)) or request(self, *a))
    ipc = WeightSync(servers, sync_config(transport="ipc"), "cpu")
    for version in (3, 4):
        hf = changed(model_directory, version)
        tensors = named_tensors(hf)
        ipc.push(iter(tensors), version)
        ipc.verify(tensors)
        assert largest_difference(hf, PROMPTS, client.generate(PROMPTS, 2), 1.0) < 1e-5
    ipc.close()
    assert sum(map(len, bodies)) < 40_000 < sum(t.nbytes for _, t in tensors)
    assert wait_until(lambda: shared_memory() == before, 5)


def test_handles_for_another_host_are_refused(servers, monkeypatch):
    monkeypatch.setattr(transports, "is_local", lambda url: False)
    with pytest.raises(RunError, match=r'sync\.transport is "ipc", .* is another host; choose "distributed" or "disk"'):
        WeightSync(servers, sync_config(transport="ipc"), "cpu")


def test_too_little_shared_memory_is_one_sentence(servers, model_directory, monkeypatch):
    """Writing beyond it would end the process with SIGBUS."""
    ipc = WeightSync(servers, sync_config(transport="ipc"), "cpu")
    monkeypatch.setattr(tensor_handles.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"/dev/shm has 0 MiB left .* lower rollout.sync.bucket_mib"):
        ipc.push(named_tensors(load_hf(model_directory)), 5)
    ipc.control.on_all("end_weight_update", {})
    ipc.close()


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"torch_{os.getpid()}_*")}


def test_a_tensor_corrupted_on_its_way_is_named(sync, model_directory, monkeypatch):
    """One flipped bit in one bucket, after the engine and before the server."""
    tensors = named_tensors(changed(model_directory, 4))
    send, broadcasts = BroadcastGroup.broadcast, []

    def corrupt(group, flat, *rest):
        if not broadcasts:
            before = sum(t.nbytes for _, t in tensors[: [n for n, _ in tensors].index(UP)])
            flat[before] ^= 1  # the lowest mantissa bit of the first weight of UP
        broadcasts.append(len(flat))
        send(group, flat, *rest)

    monkeypatch.setattr(BroadcastGroup, "broadcast", corrupt)
    sync.push(tensors, 4)
    with pytest.raises(RunError, match=r"corrupted: model.layers.1.mlp.gate_up_proj.weight .*up_proj.weight\) differs"):
        sync.verify(tensors)
    monkeypatch.undo()
    sync.push(tensors, 5)
    sync.verify(tensors)


def test_a_tensor_left_out_is_named(sync, model_directory):
    tensors = named_tensors(changed(model_directory, 6))
    sync.push([(n, t) for n, t in tensors if n != "model.norm.weight"], 6)
    with pytest.raises(RunError, match=r"model\.norm\.weight .* differs from"):
        sync.verify(tensors)
    with pytest.raises(RunError, match=r"model\.norm\.weight .* is there, but not in"):
        sync.verify([(n, t) for n, t in tensors if n != "model.norm.weight"])


def test_wrong_version_is_named(sync, monkeypatch):
    sync.push([], 7)
    with pytest.raises(RunError, match="serves weight version '7' instead of 8"):
        sync.check_version(8)


def test_a_refused_bucket_is_one_sentence_at_once(servers, sync, model_directory, monkeypatch):
    """Without begin_weight_update SGLang answers 400 and takes no part in the broadcast: nobody may wait for it."""
    tensors = named_tensors(changed(model_directory, 8))
    on_all = Control.on_all
    skip = ("begin_weight_update",)
    monkeypatch.setattr(Control, "on_all", lambda self, e, *a, **k: e in skip or on_all(self, e, *a, **k))
    start = time.monotonic()
    with pytest.raises(RunError, match=r"update_weights_from_distributed refused with HTTP 400: .*begin_weight_update"):
        sync.push(tensors, 8)
    assert time.monotonic() - start < 10
    start = time.monotonic()
    sync.close()  # the group is broken: leaving it must not wait for the server
    assert time.monotonic() - start < 5


def test_servers_that_do_not_join_are_an_error_within_the_timeout(servers, monkeypatch):
    monkeypatch.setattr(transports, "address_towards", lambda url: "127.0.0.1")
    request = Control.request

    def deaf(self, method, url, endpoint, body=None):
        if endpoint == "init_weights_update_group":
            time.sleep(4)
            return {"success": True}
        return request(self, method, url, endpoint, body)

    monkeypatch.setattr(Control, "request", deaf)
    start = time.monotonic()
    with pytest.raises(RunError, match=r"weight group of 2 ranks did not form"):
        WeightSync(servers, sync_config(timeout=3.0), "cpu")
    assert time.monotonic() - start < 10
