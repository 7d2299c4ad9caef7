"""Names, shapes and places of adapters, held against PEFT's own."""

import math
import shutil

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_egrsd.config import LoraConfig
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapters import (
    AdapterSpec,
    adapted_weights,
    adapter_entries,
    adapter_shapes,
    adapter_spec,
    initial_tensor,
)
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.checkpoint import save_hf
from megatron_egrsd.hf.fingerprint import fingerprint
from megatron_egrsd.hf.mapping import hf_shapes
from tests.models import make_qwen3

pytestmark = pytest.mark.heavy  # imports transformers and peft


@pytest.mark.parametrize("targets", [TARGETS, ("o_proj", "q_proj"), ("down_proj",)])
@pytest.mark.parametrize("experts", [{}, {"num_experts": 4}])
def test_names_and_shapes_are_those_of_peft(targets, experts, tmp_path):
    if experts:
        targets = [name for name in targets if name in ATTENTION] or ["v_proj"]
    path = make_qwen3(tmp_path / "model", num_hidden_layers=2, **experts)
    model = AutoModelForCausalLM.from_pretrained(path)
    expected = get_peft_model_state_dict(get_peft_model(model, PeftConfig(r=3, target_modules=list(targets))))
    arch = Architecture.from_pretrained(path)
    shapes = adapter_shapes(arch, AdapterSpec(3, 6.0, tuple(targets)))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert [entry.hf for entry in adapter_entries(arch, AdapterSpec(3, 6.0, tuple(targets)))] == [(n,) for n in shapes]


def test_an_adapter_belongs_to_a_weight(tmp_path):
    arch = Architecture.from_pretrained(make_qwen3(tmp_path / "model"))
    spec = AdapterSpec(4, 8.0, TARGETS)
    shapes, weights = adapter_shapes(arch, spec), hf_shapes(arch)
    pairs = adapted_weights(arch, spec)
    assert len(pairs) == 7 * arch.num_layers and len(shapes) == 2 * len(pairs)
    for weight, (a, b) in pairs.items():
        assert (torch.zeros(shapes[b]) @ torch.zeros(shapes[a])).shape == weights[weight]


def test_the_scale():
    assert adapter_spec(LoraConfig(rank=64)).scale == 2
    assert adapter_spec(LoraConfig(rank=64, alpha=16)).scale == 0.25
    assert adapter_spec(LoraConfig()) is None
    assert AdapterSpec(8, 8.0, ("o_proj", "q_proj")) == AdapterSpec(8, 8.0, ("q_proj", "o_proj"))


def test_experts_get_no_adapter(tmp_path):
    arch = Architecture.from_pretrained(make_qwen3(tmp_path / "model", num_experts=4))
    with pytest.raises(BadArgument, match=r"names gate_proj, up_proj, down_proj, but the experts .* q_proj"):
        AdapterSpec(4, 8.0, TARGETS).check(arch)
    AdapterSpec(4, 8.0, ATTENTION).check(arch)


def test_heads_that_ranks_share_get_no_adapter(tmp_path):
    arch = Architecture.from_pretrained(make_qwen3(tmp_path / "model"))  # four heads, two of keys and values
    with pytest.raises(BadArgument, match=r"names q_proj, v_proj, but parallel.tensor = 4 .* 2 key/value heads"):
        AdapterSpec(4, 8.0, ("q_proj", "v_proj", "o_proj")).check(arch, 4)
    AdapterSpec(4, 8.0, TARGETS).check(arch, 2)
    AdapterSpec(4, 8.0, ("o_proj", "up_proj")).check(arch, 4)


def test_the_first_values_follow_from_the_seed_and_the_name():
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    a = initial_tensor(name, (8, 400), seed=1)
    assert torch.equal(a, initial_tensor(name, (8, 400), seed=1))
    assert not torch.equal(a, initial_tensor(name, (8, 400), seed=2))
    assert not torch.equal(a, initial_tensor(name.replace("q_proj", "k_proj"), (8, 400), seed=1))
    reference = torch.empty(8, 400)
    torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))  # what PEFT does
    assert a.abs().max() <= 1 / 20 and float(a.std()) == pytest.approx(float(reference.std()), rel=0.05)
    assert not initial_tensor(name.replace("lora_A", "lora_B"), (400, 8), seed=1).any()


def test_the_hash_of_the_weights_does_not_depend_on_their_files(tmp_path):
    path = make_qwen3(tmp_path / "model", tied=False)
    tensors = load_file(path / "model.safetensors")
    save_hf(((name, tensors[name]) for name in hf_shapes(Architecture.from_pretrained(path))), path, tmp_path / "split",
            shard_bytes=50_000)  # fmt: skip
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert fingerprint(path) == fingerprint(tmp_path / "split")

    changed = shutil.copytree(path, tmp_path / "changed")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1  # the last bit of one number
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(path) != fingerprint(changed)

    other = shutil.copytree(path, tmp_path / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert (other / "config.json").read_text() != config
    assert fingerprint(path) != fingerprint(other)
