"""A real router (sglang-router) in front of a real server: its address stands for the server."""

import subprocess
import sys
import threading

import httpx
import pytest

from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.ports import choose_ports
from megatron_egrsd.rollout.router import servers_behind
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.rollout.conftest import START_TIMEOUT, load_hf, named_tensors, rollout_config, servers_config, wait_until

pytestmark = pytest.mark.timeout(START_TIMEOUT + 60)


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    """The URL of a router that knows no server yet."""
    port, metrics = choose_ports("127.0.0.1", 0, 2)
    command = [sys.executable, "-m", "sglang_router.launch_router", "--port", str(port), "--prometheus-port",
               str(metrics), "--prometheus-host", "127.0.0.1", "--log-level", "warn"]  # fmt: skip
    with open(tmp_path_factory.mktemp("router") / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_until(lambda: process.poll() is not None or _answers(url), 60) and process.poll() is None
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/workers").status_code == 200
    except httpx.TransportError:
        return False


def test_a_router_without_servers_is_waited_for_and_then_named(router, model, tmp_path):
    with pytest.raises(RunError, match=f"the router at {router} knew no server within 1 s"):
        RolloutServers(servers_config(urls=[router], start_timeout=1.0), model, 0, tmp_path)


def test_the_servers_behind_a_router_get_weights_and_requests(router, servers, model, model_directory, tmp_path):
    config = rollout_config(servers_config(urls=[router + "/", servers.urls[0]]))
    later = threading.Timer(1.0, lambda: httpx.post(f"{router}/workers", json={"url": servers.urls[0]}))
    later.start()
    with RolloutServers(config.servers, model, 0, tmp_path) as attached:
        later.join()
        assert attached.urls == servers.urls  # once, though it was also named itself
        WeightSync(attached, config.sync, "cpu").push(named_tensors(load_hf(model_directory)), 3)
        answers = RolloutClient(attached, config).generate([[5, 6, 7]], 4)[0]
        assert [a.weight_version for a in answers] == [3] * 4


def workers(*urls: str, kind: str = "regular") -> dict:
    return {"workers": [{"url": url, "worker_type": kind} for url in urls]}


@pytest.mark.parametrize("status, answer, found", [
    (404, "", ["http://r:1"]),
    (200, "a page", ["http://r:1"]),
    (200, {"workers": "none"}, ["http://r:1"]),
    (200, workers("http://a:1@0", "http://a:1@1", "http://b:1/"), ["http://a:1", "http://b:1"]),
    (200, workers("http://a:1", kind="prefill"), "a:1, a server of type prefill"),
    (200, workers("grpc://a:1"), "grpc://a:1, a server of type regular"),
])  # fmt: skip
def test_what_is_behind_an_address(status, answer, found):
    kind = {"json": answer} if isinstance(answer, dict) else {"text": answer}
    http = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(status, **kind)))
    if isinstance(found, list):
        assert servers_behind(http, "http://r:1", 1.0) == found
    else:
        with pytest.raises(RunError, match=found):
            servers_behind(http, "http://r:1", 1.0)
