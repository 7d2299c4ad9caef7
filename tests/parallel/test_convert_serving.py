"""The export serves: transformers and SGLang generate from it what transformers generates from the original."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_egrsd.hf.convert import ToHF, ToMegatron

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "model"
PROMPTS = ["3+4-2+5-1", "9-4+2+2+8", "1+1+1+1+1"]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("serving")
    ToMegatron(TINY, root / "megatron").run()
    ToHF(root / "megatron", root / "export", shard_bytes=200_000).run()
    assert len(list((root / "export").glob("*.safetensors"))) > 1
    return root / "export"


def prompt_ids(path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


@torch.no_grad()
def greedy(path: Path) -> list[list[int]]:
    """New tokens of each prompt from transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs = []
    for ids in prompt_ids(path):
        output = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        outputs.append(output[len(ids) :].tolist())
    return outputs


def test_transformers_generates_the_same_tokens(export):
    expected = greedy(TINY)
    assert greedy(export) == expected
    assert any(len(set(tokens)) > 3 for tokens in expected)  # text, not one token over and over


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_sglang_serves_the_export(export, tmp_path):
    from megatron_egrsd.config import EvaluationConfig, ModelConfig, RolloutConfig, ServersConfig
    from megatron_egrsd.rollout.client import RolloutClient
    from megatron_egrsd.rollout.servers import RolloutServers

    settings = ServersConfig(max_total_tokens=4096, max_concurrent_requests=8, start_timeout=280.0)
    config = RolloutConfig(max_response_tokens=NEW_TOKENS, servers=settings)
    with RolloutServers(settings, ModelConfig(str(export), "float32"), 0, tmp_path) as servers:
        client = RolloutClient(servers, config)
        answers = client.generate(prompt_ids(export), 1, settings=EvaluationConfig(temperature=0.0))
    assert [answer.response_ids for [answer] in answers] == greedy(TINY)
