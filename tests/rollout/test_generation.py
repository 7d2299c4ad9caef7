"""Sampling from a real server: order, log-probabilities, limits, refusals."""

import pytest
import torch

from megatron_egrsd.config import EvaluationConfig, ModelConfig
from megatron_egrsd.data.prompt_builder import UNUSED_TOKENS
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers
from tests.models import make_qwen3
from tests.rollout.conftest import START_TIMEOUT, largest_difference, load_hf, rollout_config, servers_config

pytestmark = pytest.mark.timeout(START_TIMEOUT + 100)
PROMPTS = [[5 + i] * (1 + 3 * i) for i in range(12)]  # ragged


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_logits_over_temperature(client, servers, model_directory, temperature):
    servers.check_alive()
    answers = client.generate(PROMPTS, 3, settings=rollout_config(temperature=temperature))
    assert largest_difference(load_hf(model_directory), PROMPTS, answers, temperature) < 1e-5


@pytest.mark.slow
def test_bf16_logits_are_not_rounded(tmp_path):
    """Logits of a language model have a common offset of 10 to 30; bf16 has steps of 0.06 to 0.12 there."""
    make_qwen3(tmp_path / "model", num_hidden_layers=2, tied=False)
    hf = load_hf(tmp_path / "model")
    with torch.no_grad():  # the same for all tokens of the vocabulary: no probability changes
        direction = torch.randn(hf.config.hidden_size, generator=torch.Generator().manual_seed(0))
        hf.lm_head.weight += 20 * direction / direction.norm()
    hf.bfloat16().save_pretrained(tmp_path / "model")
    with RolloutServers(servers_config(), ModelConfig(str(tmp_path / "model"), "bfloat16"), 0, tmp_path) as servers:
        answers = RolloutClient(servers, rollout_config()).generate(PROMPTS, 6)
    errors = []
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for a in group:
            with torch.no_grad():
                hidden = hf.model(torch.tensor([prompt + a.response_ids])).last_hidden_state[0, len(prompt) - 1 : -1]
                log_probs = (hidden.float() @ hf.lm_head.weight.float().T).log_softmax(-1)
            errors.append(torch.tensor(a.log_probs) - log_probs.gather(1, torch.tensor(a.response_ids)[:, None])[:, 0])
    assert torch.cat(errors).abs().mean() < 0.012  # 0.006; 0.026 with rounded logits


def test_answers_that_another_process_reads(client, model_directory, monkeypatch):
    monkeypatch.setattr("megatron_egrsd.rollout.client.LARGE", 0)
    answers = client.generate(PROMPTS, 3)
    assert largest_difference(load_hf(model_directory), PROMPTS, answers, 1.0) < 1e-5


def test_order_counts_and_finish_reasons(client, model_directory):
    answers = client.generate(PROMPTS, 4)
    assert [len(group) for group in answers] == [4] * len(PROMPTS)
    assert len({tuple(a.response_ids) for group in answers for a in group}) > 40  # samples, not copies
    reasons = set()
    for a in (a for group in answers for a in group):
        reasons.add(a.finish_reason)
        assert len(a.response_ids) == len(a.log_probs)
        assert a.finish_reason == ("stop" if a.response_ids[-1] == 2 else "length")
        assert a.finish_reason == "stop" or len(a.response_ids) == 40
    assert reasons == {"stop", "length"}


def test_greedy_is_hf_greedy(client, model_directory):
    hf = load_hf(model_directory)
    answers = client.generate(PROMPTS[:4], 1, settings=EvaluationConfig(temperature=0.0))
    for prompt, [answer] in zip(PROMPTS[:4], answers, strict=True):
        ids = hf.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert answer.response_ids == ids[0, len(prompt) :].tolist()


class NeverStopping(RolloutClient):
    def sampling(self, *arguments):
        return super().sampling(*arguments) | {"ignore_eos": True}


def test_a_response_that_the_server_has_no_room_for_is_an_error(servers, model_directory):
    """SGLang would call it cut at max_new_tokens, and its reward would be 0."""
    client = NeverStopping(servers, rollout_config())
    context = load_hf(model_directory).config.max_position_embeddings
    prompt, most = [5] * (context - 20), 20 - UNUSED_TOKENS
    [[answer]] = client.generate([prompt], 1, max_new_tokens=most)
    assert len(answer.response_ids) == most
    with pytest.raises(
        RunError, match=rf"cut a response after {most} of {most + 1} tokens: with its prompt of {len(prompt)}"
    ):
        client.generate([prompt], 1, max_new_tokens=most + 1)


def test_extra_stop_token(servers):
    stopping = RolloutClient(servers, rollout_config(), stop_token_ids=list(range(61)))
    assert {len(a.response_ids) for [a] in stopping.generate(PROMPTS, 1)} == {1}


def test_empty_prompt_is_refused_before_it_reaches_the_server(client, servers):
    with pytest.raises(BadArgument, match="prompt 1 of 2 has no tokens"):
        client.generate([[5], []], 1)
    servers.check_alive()


def test_a_refused_request_is_one_sentence(client):
    with pytest.raises(RunError, match=r"refused a prompt of 3 tokens.*maximum context length"):
        client.generate([[5, 6, 7]], 1, max_new_tokens=4096)


def test_request_timeout_is_an_error_and_the_server_lives_on(servers, client):
    impatient = RolloutClient(servers, rollout_config(servers_config(request_timeout=0.05)))
    with pytest.raises(RunError, match=r"did not answer within rollout.servers.request_timeout = 0.05 s"):
        impatient.generate(PROMPTS, 4, max_new_tokens=400)
    assert client.generate([[5]], 1)
