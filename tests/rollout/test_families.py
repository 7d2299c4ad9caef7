"""Families beside Qwen3 on a server of their own: its log-probs, and the weights that training sends, biases too."""

import pytest
import torch

from megatron_egrsd.config import ModelConfig
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.models import YARN_ROPE, make_model
from tests.rollout.conftest import (
    START_TIMEOUT,
    largest_difference,
    load_hf,
    named_tensors,
    rollout_config,
    servers_config,
    sync_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(START_TIMEOUT + 100)]
PROMPTS = [[5 + i] * (1 + 9 * i) for i in range(12)]  # ragged; some end behind the context before scaling
MODELS = {
    "Qwen2": ("qwen2", {}),
    "Llama 3": ("llama", {}),
    "Qwen3 with YaRN": ("qwen3", {"rope_parameters": YARN_ROPE}),
}


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_of_the_initial_and_of_new_weights(name, tmp_path):
    family, sizes = MODELS[name]
    path = make_model(tmp_path / "model", family, num_hidden_layers=2, **sizes)
    hf = load_hf(path)
    with RolloutServers(servers_config(), ModelConfig(str(path), "float32"), 0, tmp_path) as servers:
        client = RolloutClient(servers, rollout_config())
        assert largest_difference(hf, PROMPTS, client.generate(PROMPTS, 2), 1.0) < 1e-5
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        sync = WeightSync(servers, sync_config(), "cpu")
        sync.push(named_tensors(hf), 1)
        sync.verify(named_tensors(hf))
        assert largest_difference(hf, PROMPTS, client.generate(PROMPTS, 2), 1.0) < 1e-5
        sync.close()
