"""Routing replay: a server that routes otherwise and an engine agree, because the engine takes the server's experts."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_egrsd.config import ModelConfig, ParallelConfig, RolloutConfig
from megatron_egrsd.data.packing import Sequence
from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.generation import NOTHING
from megatron_egrsd.rollout.partial import SamplingPhase
from megatron_egrsd.rollout.servers import RolloutServers
from tests.copies import FIRST_VARIABLE
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.rollout.conftest import START_TIMEOUT, rollout_config, servers_config
from tests.training import open_engine, training_config

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(START_TIMEOUT + 200)]
LAYERS, EXPERTS, CHOSEN = 3, 8, 2
PROMPTS = [[5 + i] * (1 + 7 * i) for i in range(6)]


def disturb_routing() -> None:
    """Let SGLang choose by other scores than those that weigh the experts; called in a server before it starts."""
    from sglang.srt.layers.moe import topk

    choose, bias = topk.fused_topk_native, torch.linspace(0.0, 0.5, EXPERTS)
    topk.fused_topk_native = lambda *, correction_bias, **given: choose(**given, correction_bias=bias)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("experts"), num_experts=EXPERTS, num_hidden_layers=LAYERS, tied=False)


@pytest.fixture(scope="module")
def disturbed(mixture, tmp_path_factory):
    config = servers_config(args={"enable-return-routed-experts": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FIRST_VARIABLE, f"{__name__}:{disturb_routing.__name__}")
        with RolloutServers(
            config, ModelConfig(str(mixture), "float32"), 0, tmp_path_factory.mktemp("logs")
        ) as servers:
            yield servers


def _score(rank, world_size, config, pairs):
    """Return each rank's log-probs and the share of changed choices: with the routes, and without."""
    results = []
    with open_engine(config) as engine:
        for replayed in (True, False):
            sequences = [Sequence(p, r, routes if replayed else None) for p, r, routes in pairs]
            scores = engine.score(sequences, engine.partition([len(s) for s in sequences]))
            found = {i: s.log_prob.numpy() for i, s in scores.items()}
            results.append((found, engine.passes.routing.share_changed(engine.device)))
    return results


def pairs_of(prompts, generations):
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = generation.response_ids
        shape = len(prompt) + len(ids) - 1, LAYERS, CHOSEN
        yield prompt, ids, np.frombuffer(generation.routes, np.uint8).reshape(shape)


def differences(model, prompts, generations, parallel: dict):
    """Return the largest difference in log-prob, and the share of choices that the engine would change, twice."""
    layout = ParallelConfig(max_tokens_per_microbatch=256, **parallel)
    config = training_config(model, parallel=layout, rollout=RolloutConfig(rollouts_per_prompt=4))
    world = layout.tensor * layout.pipeline * layout.context
    ranks = run_ranks(_score, world, config, list(pairs_of(prompts, generations)))
    sampled = [torch.tensor(g.log_probs) for g in generations]
    for scores, share in ranks[0]:
        yield max((torch.from_numpy(scores[i]) - s).abs().max().item() for i, s in enumerate(sampled)), share


def test_engine_and_server_agree_by_the_server_s_experts(mixture, disturbed):
    client = RolloutClient(disturbed, rollout_config(max_response_tokens=24))
    generations = [g for group in client.generate(PROMPTS, 1, routes=True) for g in group]
    (replayed, changed), (own, nothing) = differences(mixture, PROMPTS, generations, {})
    assert replayed < 1e-5
    assert own > 1e-2
    assert changed > 0.1
    assert nothing == 0


def test_a_response_that_was_stopped_has_the_routes_of_all_its_tokens(mixture, disturbed):
    config = rollout_config(max_response_tokens=150, staleness=1, partial=True, routing_replay=True)
    client = RolloutClient(disturbed, config)
    responses = [[NOTHING] for _ in PROMPTS]
    seconds, stopped = 0.1, 0  # responses that a stop found in the middle
    with ThreadPoolExecutor(1) as thread:
        while not all(own[0].finished for own in responses):
            phase = SamplingPhase(client, thread)
            for prompt, own in zip(PROMPTS, responses, strict=True):
                phase.add(prompt, own, lambda: None)
            time.sleep(seconds)
            phase.stop()
            stopped += sum(bool(own[0].response_ids) and not own[0].finished for own in responses)
            seconds *= 1.5  # a busy machine samples nothing in a tenth of a second
    assert stopped
    generations = [own[0] for own in responses]
    (replayed, _), _ = differences(mixture, PROMPTS, generations, {})
    assert replayed < 1e-5


def test_a_server_that_does_not_tell_is_named(client):
    with pytest.raises(RunError, match=r"does not say which experts.*--enable-return-routed-experts"):
        client.generate(PROMPTS[:1], 1, routes=True)
