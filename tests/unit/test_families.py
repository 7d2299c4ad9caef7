"""Every family is read from its config.json as transformers reads it, and what is outside is refused by name."""

import json

import pytest
import torch

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import hf_shapes
from megatron_egrsd.hf.rope import frequencies
from tests.models import FAMILIES, LLAMA3_ROPE, YARN_ROPE, make_model
from tests.random_checkpoints import DENSE, LLAMA, QWEN2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_parameters_are_those_of_transformers(family, tied, tmp_path):
    from safetensors import safe_open

    path = make_model(tmp_path, family, tied=tied, **({"num_experts": 4} if "moe" in family else {}))
    arch = Architecture.from_pretrained(path)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_shapes(arch) == stored
    assert arch.num_parameters == sum(torch.Size(shape).numel() for shape in stored.values())


# Published scalings, and bounds that cut off part of the dimensions.
ROPES = {
    "plain": ({"rope_type": "default"}, 64),
    "Llama-3.1-8B": (LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}, 128),
    "Llama-3.2-1B": (LLAMA3_ROPE | {"rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}, 64),
    "tiny Llama": (LLAMA3_ROPE, 24),
    "Qwen3 to 131,072": (YARN_ROPE | {"rope_theta": 1e6, "original_max_position_embeddings": 32768}, 128),
    "other bounds": (YARN_ROPE | {"beta_fast": 64.0, "beta_slow": 2.0, "original_max_position_embeddings": 4096}, 128),
    "tiny": (YARN_ROPE, 24),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, head_dim = ROPES[name]
    rope = {"rope_theta": 10000.0} | rope
    config = {"head_dim": head_dim, "max_position_embeddings": 131072}
    expected = LlamaRotaryEmbedding(LlamaConfig(**config, rope_parameters=dict(rope)))
    for keys in ({"rope_parameters": rope}, {"rope_theta": rope["rope_theta"], "rope_scaling": rope}):
        arch = Architecture.from_config(LLAMA | {"rope_scaling": None} | config | keys)
        scaling = arch.rope_scaling
        own = scaling.scaled(arch.rope_theta, head_dim) if scaling else frequencies(arch.rope_theta, head_dim)
        torch.testing.assert_close(own, expected.inv_freq, rtol=1e-6, atol=0)
        assert (scaling.attention_factor if scaling else 1.0) == expected.attention_scaling


OUTSIDE = {
    "biases everywhere": (LLAMA, {"attention_bias": True}, "attention_bias"),
    "biases in the MLP": (LLAMA, {"mlp_bias": True}, "mlp_bias"),
    "Qwen3 with biases": (DENSE, {"attention_bias": True}, "attention_bias"),
    "a sliding window": (QWEN2, {"use_sliding_window": True}, "use_sliding_window"),
    "a sliding layer": (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "rope of images": (QWEN2, {"use_mrope": True}, "use_mrope"),
    "another activation": (LLAMA, {"hidden_act": "gelu"}, "gelu"),
    "another rope": (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    "rope of a part": (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "half a rope": (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    "a rope of words": (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"factor": "8"}}, "factor of its llama3 rope to '8'"),
    "a rope of nothing": (QWEN2, {"rope_scaling": YARN_ROPE | {"factor": 0}}, "factor of its yarn rope to 0"),
    "a rope upside down": (LLAMA, {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "not below"),
    "an unknown model": (LLAMA, {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_is_outside_is_refused_by_name(case, tmp_path):
    base, changes, word = OUTSIDE[case]
    (tmp_path / "config.json").write_text(json.dumps(base | changes))
    with pytest.raises(BadArgument, match=word) as error:
        Architecture.from_pretrained(tmp_path)
    assert str(error.value).count(". ") == 0, "one sentence"
