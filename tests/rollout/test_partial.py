"""Responses stopped by a real server and continued with other weights: every token, and its weight version."""

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

from megatron_egrsd.config import Config, DataConfig, ObjectiveConfig
from megatron_egrsd.data.problems import Place, batch_indices
from megatron_egrsd.data.samples import Problem, Prompt
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.generation import NOTHING, Generation
from megatron_egrsd.rollout.partial import SamplingPhase
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.rollout.weight_sync import WeightSync
from megatron_egrsd.sampling.batches import check_versions
from megatron_egrsd.sampling.partial_batches import PartialBatches
from megatron_egrsd.sampling.sampler import Sampler
from tests.rollout.conftest import (
    START_TIMEOUT,
    hf_log_probs,
    load_hf,
    named_tensors,
    rollout_config,
    servers_config,
    sync_config,
    wait_until,
)

pytestmark = pytest.mark.timeout(START_TIMEOUT + 100)
PROMPTS = [[5 + i] * (1 + 3 * i) for i in range(8)]
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def thread():
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.fixture(scope="module")
def sync(servers):
    with contextlib.closing(WeightSync(servers, sync_config(), "cpu")) as sync:
        yield sync


def weights(model_directory, version: int):
    """Return a very different model for each version, so that a token with a wrong version is detected."""
    hf = load_hf(model_directory)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return hf


def check(response: Generation, prompt: list[int], models: dict, stop: set[int], longest: int) -> None:
    """Check that the response is complete and that every segment has the log-probs of its version."""
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
    some = servers_config(max_concurrent_requests=concurrency)
    config = rollout_config(some, max_response_tokens=longest, temperature=TEMPERATURE)
    client = RolloutClient(servers, config, sorted(stop))
    versions, most = iter(range(100, 400)), 0
    while most < 2:  # the machine's speed decides how far a phase gets: repeat until one stops in a response
        responses, done, models = [[NOTHING] * n for _ in PROMPTS], [], {}
        while len(done) < len(PROMPTS):
            version = next(versions)
            models[version] = weights(model_directory, version)
            sync.push(named_tensors(models[version]), version)
            phase = SamplingPhase(client, thread)
            for i, prompt in enumerate(PROMPTS):
                if i not in done:
                    phase.add(prompt, responses[i], lambda i=i, done=done: done.append(i))
            time.sleep(seconds * (1.0, 0.5, 1.5)[version % 3])
            seconds *= 1.03  # beside other processes a phase may be too short for any token
            phase.stop()
        assert sorted(done) == list(range(len(PROMPTS)))  # once each
        for prompt, group in zip(PROMPTS, responses, strict=True):
            for response in group:
                check(response, prompt, models, stop, longest)
        most = max(len(r.segments) for group in responses for r in group)
    assert {r.finish_reason for group in responses for r in group} == {"stop", "length"}


def test_batches_of_a_run_whose_sampling_goes_on(servers, sync, thread, model, model_directory):
    """Batch, fill up, stop, new weights, as in train.py: nothing is too old, lost or trained twice."""
    size, steps, longest, stop = 3, 8, 60, {2, 3, 4}
    rollout = rollout_config(prompts_per_step=size, rollouts_per_prompt=2, max_response_tokens=longest, staleness=2,
                             partial=True, extra_prompts=size, temperature=TEMPERATURE)  # fmt: skip
    config = Config(model, DataConfig(train="d"), ObjectiveConfig(importance_cap=2.0), rollout=rollout, steps=steps)
    prompts = [Prompt(Problem(str(i), "p", "a"), [5 + i] * (1 + i), [5]) for i in range(size * steps)]
    tokenizer = AutoTokenizer.from_pretrained("examples/tiny/model")
    sampler = Sampler(RolloutClient(servers, rollout, sorted(stop)), tokenizer, lambda *_: 1.0)
    batches = PartialBatches(sampler, thread, rollout, steps, config.seed, Place())
    models, trained = {}, []
    for step in range(steps):
        models[step] = weights(model_directory, step)
        sync.push(named_tensors(models[step]), step)
        batch = batches.batch(prompts, step).rollouts
        batches.ahead(prompts, step + 1)
        assert [r.group for r in batch] == [g for g in range(size) for _ in range(2)]
        check_versions(batch, step, rollout.staleness)
        for r in batch:
            check(Generation(r.response_ids, r.rollout_log_probs, r.finish_reason, r.versions), r.prompt.student_ids,
                  models, stop, longest)  # fmt: skip
            assert r.reward == (r.finish_reason == "stop")
        trained += batch
        batches.wait()
    assert not batches.groups
    drawn = [int(r.prompt.problem.id) for r in trained[::2]]
    order = batch_indices(len(prompts), size * steps, 0, config.seed)
    assert sorted(drawn) == sorted(order) and drawn != order  # some were overtaken
    assert any(r.segments for r in trained)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_beginnings_outlive_their_servers(model, model_directory, thread, tmp_path):
    """Of two servers one is killed while it samples, and the other continues; then both are killed."""
    longest, stop = 450, {2}
    two = servers_config(engines=2, start_timeout=300)
    config = rollout_config(two, max_response_tokens=longest, temperature=TEMPERATURE)
    responses, done, models, lost = [[NOTHING] * 8 for _ in PROMPTS], [], {}, []
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(RolloutServers(config.servers, model, 0, tmp_path))
        sync = stack.enter_context(contextlib.closing(WeightSync(servers, config.sync, "cpu")))
        client = RolloutClient(servers, config, sorted(stop))
        for version in range(200, 260):
            models[version] = weights(model_directory, version)
            sync.push(named_tensors(models[version]), version)
            before = [r for group in responses for r in group]
            phase = SamplingPhase(client, thread)
            for i, prompt in enumerate(PROMPTS):
                if i not in done:
                    phase.add(prompt, responses[i], lambda i=i: done.append(i))
            time.sleep(0.05 if version <= 203 else 0.5)  # all are begun when the servers die, and then they end
            victims = servers.servers[: {202: 1, 203: 2}.get(version, 0)]
            for server in victims:
                os.killpg(server.process.pid, signal.SIGKILL)
            assert wait_until(lambda dead=victims: all(server.lost for server in dead), 30)
            assert len(victims) < 2 or wait_until(phase.future.done, 30)
            try:
                phase.stop()
            except ServersLost:
                lost.append(version)
            after = [r for group in responses for r in group]
            assert all(
                a.response_ids == b.response_ids[: len(a.response_ids)] for a, b in zip(before, after, strict=True)
            )
            assert version != 203 or any(r.segments and not r.finished for r in after)
            if len(done) == len(PROMPTS):
                break
    assert lost == [203] and servers.restarts == 3
    assert sorted(done) == list(range(len(PROMPTS)))
    for prompt, group in zip(PROMPTS, responses, strict=True):
        for response in group:
            check(response, prompt, models, stop, longest)
