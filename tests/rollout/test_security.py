"""Access to a launched server, and the places where its key appears."""

import httpx
import psutil
import pytest

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.processes import is_running
from tests.rollout.conftest import (
    START_TIMEOUT,
    load_hf,
    named_tensors,
    processes_of_group,
    rollout_config,
    servers_config,
)

KEY = "sk-not-to-be-seen-anywhere"


def test_a_key_variable_that_is_not_set_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = servers_config(urls=["http://127.0.0.1:9"], api_key_variable="NO_SUCH_KEY")
    with pytest.raises(BadArgument, match="names NO_SUCH_KEY, but that variable is not set"):
        RolloutServers(config, model, 0, tmp_path)


@pytest.mark.timeout(START_TIMEOUT + 60)
@pytest.mark.usefixtures("new_interpreters")
def test_the_key_is_needed_and_stays_unseen_and_only_this_host_gets_in(model, model_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("EGRSD_TEST_KEY", KEY)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the training ranks', not the server's
    config = rollout_config(servers_config(api_key_variable="EGRSD_TEST_KEY"))
    with RolloutServers(config.servers, model, 0, tmp_path) as servers:
        url, group = servers.urls[0], processes_of_group(servers.servers[0].process.pid)
        assert all(process.environ().get("OMP_NUM_THREADS", "1") == "1" for process in group)
        assert len(RolloutClient(servers, config).generate([[5, 6]], 2)[0]) == 2
        WeightSync(servers, config.sync, "cpu").push(named_tensors(load_hf(model_directory)), 1)
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
        assert httpx.post(f"{url}/generate", json=body, timeout=20).status_code == 401
        assert not any(KEY in " ".join(process.cmdline()) for process in group if is_running(process))
        group = [process for process in group if is_running(process)]
        listening = [c.laddr for p in group for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert [a.ip for a in listening if a.port == int(url.rpartition(":")[2])] == ["127.0.0.1"]
        servers.key = "another"
        with pytest.raises(RunError, match="HTTP 401") as error:
            RolloutClient(servers, config).generate([[5, 6]], 1)
        assert KEY not in str(error.value)
    assert all(KEY.encode() not in log.read_bytes() for log in tmp_path.rglob("*.log"))
