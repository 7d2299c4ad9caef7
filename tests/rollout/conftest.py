"""One real SGLang server on CPU for the tests of this directory, with a random Qwen3 of 0.2M parameters."""

import contextlib
import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_egrsd.config import ModelConfig, RolloutConfig, ServersConfig, SyncConfig
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.models import make_qwen3

START_TIMEOUT = 280.0  # seconds; 20 on two idle cores, and 150 beside four other processes


def servers_config(**overrides) -> ServersConfig:
    defaults = {
        "max_total_tokens": 16384,
        "max_concurrent_requests": 64,
        "start_timeout": START_TIMEOUT,
        "request_timeout": 60.0,
    }
    return ServersConfig(**{**defaults, **overrides})


def sync_config(**overrides) -> SyncConfig:
    return SyncConfig(**{"timeout": 20.0, "bucket_mib": 1, **overrides})


def rollout_config(servers: ServersConfig | None = None, **overrides) -> RolloutConfig:
    sections = {"servers": servers or servers_config(), "sync": sync_config()}
    return RolloutConfig(**{"max_response_tokens": 40, **sections, **overrides})


def processes_of_group(group: int) -> list[psutil.Process]:
    """Return the running processes of a group; zombies do not count."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            pass
    return found


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(result)


@pytest.fixture(autouse=True, scope="package")
def copies(source):
    """Servers and runs that tests start are copies, also in end_to_end/ and faults/."""
    with source.copied():
        yield


@pytest.fixture(scope="package")
def model_directory(tmp_path_factory) -> Path:
    """Without a tokenizer: the rollout side needs none."""
    return make_qwen3(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="package")
def model(model_directory) -> ModelConfig:
    return ModelConfig(str(model_directory), "float32")


@pytest.fixture(scope="package")
def shared_servers(model, tmp_path_factory):
    """One server for all files, without a key: some reach it by its address alone."""
    with RolloutServers(servers_config(), model, 0, tmp_path_factory.mktemp("logs"), key="") as running:
        yield running


@pytest.fixture(scope="module")
def servers(shared_servers, model_directory):
    """The shared server. A file may change its weights: the next, whichever that is, finds those of the model."""
    yield shared_servers
    with contextlib.closing(WeightSync(shared_servers, sync_config(), "cpu")) as sync:
        sync.push(named_tensors(load_hf(model_directory)), 0)


@pytest.fixture(scope="module")
def client(servers) -> RolloutClient:
    return RolloutClient(servers, rollout_config())


def load_hf(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def named_tensors(hf) -> list[tuple[str, torch.Tensor]]:
    """Return the weights as the engine exports them: tied embeddings once."""
    return [(name, tensor.clone()) for name, tensor in hf.state_dict().items() if name != "lm_head.weight"]


@torch.no_grad()
def hf_log_probs(hf, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """Compute log softmax(logits / temperature) of each response token, fp32 [len(response)]."""
    logits = hf(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    log_probs = torch.log_softmax(logits / temperature, -1)
    return log_probs.gather(1, torch.tensor(response)[:, None])[:, 0]


def largest_difference(hf, prompts, answers, temperature: float) -> float:
    """Return the largest difference between SGLang's and HF's log-probabilities over all responses."""
    return max(
        (torch.tensor(a.log_probs) - hf_log_probs(hf, prompt, a.response_ids, temperature)).abs().max().item()
        for prompt, group in zip(prompts, answers, strict=True)
        for a in group
    )
