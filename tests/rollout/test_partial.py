"""Responses stopped by a real server and continued with other weights: every token, and whose it is."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_egrsd.rollout.client import NOTHING, Generation, RolloutClient
from megatron_egrsd.rollout.partial import Stretch
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.rollout.conftest import hf_log_probs, load_hf, named_tensors, rollout_config

pytestmark = pytest.mark.timeout(200)
PROMPTS = [[5 + i] * (1 + 3 * i) for i in range(8)]
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def thread():
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.fixture(scope="module")
def sync(servers):
    sync = WeightSync(servers, rollout_config(), "cpu")
    yield sync
    sync.close()


def weights(model_directory, version: int):
    """Models as different as can be: a token by another version than its own is found out."""
    hf = load_hf(model_directory)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return hf


def check(response: Generation, prompt: list[int], models: dict, stop: set[int], longest: int) -> None:
    """Whole, and every stretch has the log-probs of its version."""
    start, ids = 0, response.response_ids
    assert len(ids) == len(response.log_probs) == sum(tokens for _, tokens in response.segments)
    assert response.finish_reason == ("stop" if ids[-1] in stop else "length") and not stop & set(ids[:-1])
    assert len(ids) <= longest and (response.finish_reason == "stop" or len(ids) == longest)
    for version, tokens in response.segments:
        expected = hf_log_probs(models[version], prompt, ids, TEMPERATURE)[start : start + tokens]
        found = torch.tensor(response.log_probs[start : start + tokens])
        assert (found - expected).abs().max() < 1e-5, (version, response.segments)
        start += tokens


@pytest.mark.parametrize(
    ("concurrency", "stop", "longest", "n", "seconds"),
    [(64, {2}, 100, 4, 0.15), (9, {2}, 100, 4, 0.15), (64, set(range(2, 22)), 8, 16, 0.02)],
    ids=["all begun", "some waiting", "about to end"],
)
def test_every_token_is_of_the_weights_that_it_names(
    servers, sync, thread, model_directory, concurrency, stop, longest, n, seconds
):
    config = rollout_config(max_response_tokens=longest, max_concurrent_requests=concurrency)
    client = RolloutClient(servers, config, sorted(stop))
    responses, done, models = [[NOTHING] * n for _ in PROMPTS], [], {}
    for version in range(100, 160):
        models[version] = weights(model_directory, version)
        sync.push(named_tensors(models[version]), version)
        stretch = Stretch(client, TEMPERATURE, thread)
        for i, prompt in enumerate(PROMPTS):
            if i not in done:
                stretch.add(prompt, responses[i], lambda i=i: done.append(i))
        time.sleep(seconds)
        stretch.stop()
        if len(done) == len(PROMPTS):
            break
    assert sorted(done) == list(range(len(PROMPTS)))  # once each
    for prompt, group in zip(PROMPTS, responses, strict=True):
        for response in group:
            check(response, prompt, models, stop, longest)
    assert max(len(r.segments) for group in responses for r in group) > 1
    assert {r.finish_reason for group in responses for r in group} == {"stop", "length"}
