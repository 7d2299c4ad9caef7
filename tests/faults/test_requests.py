"""Requests that are dropped, delayed, cut or answered with nonsense: sent again, counted once, or one sentence."""

import math

import pytest

from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.faults.proxy import FAULTS, FaultyProxy
from tests.rollout.conftest import (
    START_TIMEOUT,
    largest_difference,
    load_hf,
    named_tensors,
    rollout_config,
    servers_config,
    sync_config,
)

pytestmark = pytest.mark.timeout(START_TIMEOUT + 100)
PROMPTS = [[5 + i] * (1 + 3 * i) for i in range(10)]


def through(proxy, model, tmp_path, **overrides) -> RolloutClient:
    config = rollout_config(servers_config(urls=[proxy.url], request_timeout=20.0, **overrides))
    return RolloutClient(RolloutServers(config.servers, model, 0, tmp_path), config)


def test_every_response_arrives_once_whatever_happens_to_requests(servers, model, model_directory, chance, tmp_path):
    faults = [f for f in FAULTS if f != "nan"]
    with FaultyProxy(servers.urls[0], chance, 0.3, faults) as proxy:
        answers = through(proxy, model, tmp_path, request_retries=12).generate(PROMPTS, 30)
    assert [len(group) for group in answers] == [30] * len(PROMPTS)
    assert proxy.requests == 300 + sum(proxy.counts[f] for f in faults if f != "delay")
    assert all(proxy.counts.values()), proxy.counts
    print(f"{proxy.requests} requests, faults {proxy.counts}")
    # No retried answer is mixed up with another prompt's: each is the model's answer to its own prompt.
    assert largest_difference(load_hf(model_directory), PROMPTS, answers, 1.0) < 1e-5


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in ("nan", "delay")])
def test_a_fault_that_does_not_end_is_one_sentence(fault, servers, model, chance, tmp_path):
    with FaultyProxy(servers.urls[0], chance, 1.0, [fault]) as proxy:
        client = through(proxy, model, tmp_path, request_retries=2)
        with pytest.raises(
            RunError, match=r"/generate failed.*3 attempts \(rollout.servers.request_retries\)"
        ) as error:
            client.generate(PROMPTS[:2], 2)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_server_that_never_answers_in_time(servers, model, chance, tmp_path):
    with FaultyProxy(servers.urls[0], chance, 1.0, ["delay"], patience=5.0) as proxy:
        config = rollout_config(servers_config(urls=[proxy.url], request_timeout=0.5, request_retries=1))
        client = RolloutClient(RolloutServers(config.servers, model, 0, tmp_path), config)
        with pytest.raises(
            RunError, match=r"did not answer within rollout.servers.request_timeout = 0.5 s; 2 attempts"
        ):
            client.generate(PROMPTS[:2], 2)


def test_log_probs_that_are_not_finite_arrive_as_nan(servers, model, chance, tmp_path):
    with FaultyProxy(servers.urls[0], chance, 1.0, ["nan"]) as proxy:
        answers = through(proxy, model, tmp_path).generate(PROMPTS[:3], 2)
    assert all(math.isnan(v) for group in answers for a in group for v in a.log_probs)


def test_weights_that_never_arrive_end_the_run(servers, model, model_directory, chance, tmp_path):
    """A server that is healthy but answers nonsense counts as lost each time; it is not asked for ever."""
    with FaultyProxy(servers.urls[0], chance, 1.0, ["no json"], path="/update_weight_version") as proxy:
        client = through(proxy, model, tmp_path, max_restarts=2)
        sync = WeightSync(client.servers, sync_config(), "cpu")
        for _ in range(2):
            with pytest.raises(ServersLost, match="not JSON"):
                sync.push(named_tensors(load_hf(model_directory)), 0)
        with pytest.raises(RunError, match=r"not JSON; the run gives up after 2 lost servers .*max_restarts"):
            sync.push(named_tensors(load_hf(model_directory)), 0)
        sync.close()
