"""Adapters in a real server: merged into the weights, by SGLang's own LoRA, and from `--lora-paths`."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_egrsd.config.lora import TARGETS
from megatron_egrsd.errors import RunError
from megatron_egrsd.hf.adapter_file import WEIGHTS, peft_config
from megatron_egrsd.hf.adapters import AdapterSpec, adapted_weights
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.merge import Merge
from megatron_egrsd.rollout import adapter_transports
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.server_command import lora_arguments
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.rollout.weight_sync import WeightSync
from tests.adapters import random_adapter
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
PROMPTS = [[7, 8, 9], [10] * 20, [11]]
SPEC = AdapterSpec(4, 6.0, TARGETS)


def adapter_of(base, path, seed: int):
    """Return (directory of an adapter, its tensors by PEFT's names)."""
    random_adapter(path, base, SPEC, seed=seed)
    return path, list(load_file(path / WEIGHTS).items())


def with_adapter(base, path):
    """The reference: PEFT's own model."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_hf(base), path).eval()


@pytest.fixture(scope="module")
def lora_servers(model, model_directory, tmp_path_factory):
    """A server with SGLang's LoRA, and with one adapter from its command line."""
    directory = tmp_path_factory.mktemp("lora")
    exported, _ = adapter_of(model_directory, directory / "exported", seed=9)
    arguments = lora_arguments(SPEC.rank, SPEC.targets, "cpu") | {"lora_paths": [f"exported={exported}"]}
    config = servers_config(args=arguments, max_restarts=0)
    with RolloutServers(config, model, 0, directory / "logs") as running:
        yield running


def test_a_written_adapter_is_served_from_the_command_line(lora_servers, model_directory):
    lora_servers.adapter = "exported"
    answers = RolloutClient(lora_servers, rollout_config()).generate(PROMPTS, 2)
    path = next(word for word in lora_servers.config.args["lora_paths"]).partition("=")[2]
    assert largest_difference(with_adapter(model_directory, path), PROMPTS, answers, 1.0) < 1e-5
    assert largest_difference(load_hf(model_directory), PROMPTS, answers, 1.0) > 0.1
    lora_servers.adapter = ""
    answers = RolloutClient(lora_servers, rollout_config()).generate(PROMPTS, 2)
    assert largest_difference(load_hf(model_directory), PROMPTS, answers, 1.0) < 1e-5


@pytest.mark.parametrize("transport", ["ipc", "disk"])
def test_adapters_serve_the_next_rollouts(lora_servers, model_directory, tmp_path, transport):
    config = sync_config(transport=transport, verify=transport == "ipc")
    sync = WeightSync(lora_servers, config, "cpu", tmp_path / "sync", peft_config(SPEC, model_directory))
    client = RolloutClient(lora_servers, rollout_config(temperature=0.9))
    for version in (1, 2):
        path, tensors = adapter_of(model_directory, tmp_path / str(version), seed=version)
        sync.push(iter(tensors), version)
        assert lora_servers.adapter == f"version-{version}" and sync.serves(version) and not sync.serves(version + 1)
        answers = client.generate(PROMPTS, 2)
        assert {a.weight_version for group in answers for a in group} == {version}
        assert largest_difference(with_adapter(model_directory, path), PROMPTS, answers, 0.9) < 1e-5
    lora_servers.adapter = "version-1"  # unloaded by the second push
    with pytest.raises(RunError, match=r"refused a prompt .*version-1"):
        client.generate(PROMPTS, 1)
    sync.control.on_all("unload_lora_adapter", {"lora_name": "version-2"})
    sync.close()
    lora_servers.adapter = ""


def test_after_the_first_push_only_adapted_weights_travel(servers, client, model_directory, tmp_path):
    """Bit by bit what a push of all weights gives, by every transport."""
    base, adapted = load_hf(model_directory), adapted_weights(Architecture.from_pretrained(model_directory), SPEC)
    for version, transport in enumerate(("distributed", "ipc", "disk"), 1):
        sync = WeightSync(servers, sync_config(transport=transport), "cpu", tmp_path)
        sync.push(named_tensors(base), 10 * version)
        path, _ = adapter_of(model_directory, tmp_path / transport, seed=version)
        Merge(model_directory, path, tmp_path / f"merged-{transport}").run()
        hf = load_hf(tmp_path / f"merged-{transport}")
        changed = [(name, tensor) for name, tensor in named_tensors(hf) if name in adapted]
        assert sync.serves(10 * version) and len(changed) == 14 < len(named_tensors(hf))
        sync.push(iter(changed), 10 * version + 1)
        sync.verify(named_tensors(hf))
        answers = client.generate(PROMPTS, 2)
        assert largest_difference(hf, PROMPTS, answers, 1.0) < 1e-5
        assert largest_difference(with_adapter(model_directory, path), PROMPTS, answers, 1.0) < 1e-4
        sync.close()


def test_an_adapter_corrupted_on_its_way_ends_the_server(lora_servers, model_directory, tmp_path, monkeypatch):
    """The last test of the module: `max_restarts` 0 lets nothing start again."""
    _, tensors = adapter_of(model_directory, tmp_path / "adapter", seed=3)
    config = sync_config(transport="ipc", verify=True)
    sync = WeightSync(lora_servers, config, "cpu", None, peft_config(SPEC, model_directory))
    share = adapter_transports.share

    def corrupt(bucket, device, form):
        handles, flat = share(bucket, device, form)
        flat.view(torch.uint8)[5] ^= 1
        return handles, flat

    monkeypatch.setattr(adapter_transports, "share", corrupt)
    with pytest.raises((RunError, ServersLost), match=r"has ended|LORA-CHECK"):
        sync.push(iter(tensors), 3)
    sync.close()
