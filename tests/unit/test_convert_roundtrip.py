"""Hugging Face -> Megatron -> Hugging Face gives back every byte, for any model of the families."""

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.convert import ToHF, ToMegatron
from megatron_egrsd.hf.mapping import hf_shapes
from megatron_egrsd.hf.verify import verify
from tests.random_checkpoints import DENSE, LLAMA, MOE, QWEN2, files, random_qwen3

# Two shapes of each family: attention wider or narrower than the hidden size, tied or not.
FAMILIES = {
    "0.6B": {"base": DENSE, "head_dim": 8, "num_hidden_layers": 5},
    "8B": {"base": DENSE, "head_dim": 4, "tie_word_embeddings": False},
    "32B": {"base": DENSE, "hidden_size": 20, "num_attention_heads": 8, "num_key_value_heads": 1,
            "tie_word_embeddings": False},
    "30B-A3B": {"base": MOE},
    "235B-A22B": {"base": MOE, "num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 6,
                  "norm_topk_prob": False},
    "Qwen2.5-0.5B": {"base": QWEN2},
    "Qwen2.5-7B": {"base": QWEN2, "hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1,
                   "tie_word_embeddings": False},
    "Llama-3.1-8B": {"base": LLAMA},
    "SmolLM2": {"base": LLAMA, "num_attention_heads": 3, "num_key_value_heads": 3, "rope_scaling": None,
                "tie_word_embeddings": True},
}  # fmt: skip


def raw(path) -> dict[str, tuple]:
    """Return {name: (type, shape, bytes)} of every tensor in every shard, read by safetensors itself."""
    found = {}
    for shard in path.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert name not in found
            found[name] = (tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return found


def round_trip(source, directory, **options) -> None:
    ToMegatron(source, directory / "megatron").run()
    ToHF(directory / "megatron", directory / "again", **options).run()
    assert raw(directory / "again") == raw(source)
    assert files(directory / "again") == files(source)
    report = verify(source, directory / "megatron")
    assert report["problems"] == []
    assert {row["name"] for row in report["tensors"]} == set(hf_shapes(Architecture.from_pretrained(source)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_type(family, dtype, tmp_path):
    round_trip(random_qwen3(tmp_path / "hf", dtype=dtype, **FAMILIES[family]), tmp_path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.heavy
def test_any_config_of_the_family_round_trips(data, tmp_path_factory):
    small = st.integers(1, 5)
    kv_heads = data.draw(small)
    sizes = {
        "vocab_size": data.draw(st.integers(1, 80)),
        "hidden_size": data.draw(st.integers(1, 24)),
        "intermediate_size": data.draw(st.integers(1, 24)),
        "moe_intermediate_size": data.draw(st.integers(1, 24)),
        "num_hidden_layers": data.draw(small),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * data.draw(small),
        "head_dim": data.draw(st.integers(1, 8)),
        "tie_word_embeddings": data.draw(st.booleans()),
        "num_experts": data.draw(small),
    }
    root = tmp_path_factory.mktemp("any")
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    shard_bytes = data.draw(st.integers(1, 10_000))
    base = data.draw(st.sampled_from([DENSE, MOE, QWEN2, LLAMA]))
    source = random_qwen3(root / "hf", base=base, dtype=dtype, **sizes, shard_bytes=shard_bytes)
    round_trip(source, root, shard_bytes=shard_bytes)


def test_a_rope_that_megatron_lm_cannot_say_is_refused(tmp_path):
    rope = LLAMA["rope_scaling"] | {"original_max_position_embeddings": 4096}
    random_qwen3(tmp_path / "hf", base=LLAMA, rope_scaling=rope)
    with pytest.raises(BadArgument, match=r"1, 4, 4096; Megatron-LM's arguments can say 1, 4, 8192 alone"):
        ToMegatron(tmp_path / "hf", tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_shards_are_filled_and_indexed_as_transformers_does(tmp_path):
    source = random_qwen3(tmp_path / "hf", num_hidden_layers=6)
    ToMegatron(source, tmp_path / "megatron").run()
    ToHF(tmp_path / "megatron", tmp_path / "again", shard_bytes=8000).run()
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("again/*.safetensors"))
    assert [s.name for s in shards] == sorted(set(index["weight_map"].values())) and len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert {name: s.name for s in shards for name in load_file(s)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in raw(source).values())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 8000


def test_a_head_stored_beside_tied_embeddings_comes_back(tmp_path):
    source = random_qwen3(tmp_path / "hf", tie_word_embeddings=True)  # as the releases of the small models are
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    round_trip(source, tmp_path)
    written = tmp_path / "again" / "model.safetensors"
    assert "lm_head.weight" in load_file(written)
    plan, done = ToHF(tmp_path / "megatron", tmp_path / "counted"), []
    plan.run(done.append)
    assert plan.nbytes == sum(done) == sum(tensor.nbytes for tensor in load_file(written).values())


def test_padding_never_leaves_and_never_enters(tmp_path):
    """61 rows go in, 61 are stored: no layout's padding is in the file, so none can be doubled or exported."""
    from megatron_egrsd.hf.megatron_checkpoint import MegatronCheckpoint

    source = random_qwen3(tmp_path / "hf", tie_word_embeddings=False)
    ToMegatron(source, tmp_path / "megatron").run()
    reader = MegatronCheckpoint(tmp_path / "megatron").reader
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert reader.tensors[key].shape == (61, 16)


@pytest.mark.parametrize(("family", "args"), [
    ("SmolLM2", {"group_query_attention": False, "num_query_groups": 1}),
    ("30B-A3B", {"ffn_hidden_size": 1}),
])  # fmt: skip
def test_arguments_of_megatron_lm_that_say_nothing_of_the_weights(family, args, tmp_path):
    """Without --group-query-attention, Megatron-LM saves the default of the groups; a mixture has no dense layers."""
    source = random_qwen3(tmp_path / "hf", **FAMILIES[family])
    conversion = ToMegatron(source, tmp_path / "megatron")
    vars(conversion.common["args"]).update(args)
    conversion.run()
    assert verify(source, tmp_path / "megatron")["problems"] == []
    grouped = random_qwen3(tmp_path / "grouped")
    conversion = ToMegatron(grouped, tmp_path / "other")
    vars(conversion.common["args"]).update(args)
    conversion.run()
    with pytest.raises(BadArgument, match=f"was saved with {next(iter(args))} = "):
        verify(grouped, tmp_path / "other")


def test_a_type_change_rounds_once_and_says_so_in_the_config(tmp_path):
    source = random_qwen3(tmp_path / "hf", dtype=torch.float32)
    ToMegatron(source, tmp_path / "megatron", torch.bfloat16).run()
    ToHF(tmp_path / "megatron", tmp_path / "again").run()
    expected = load_file(source / "model.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor.view(torch.int16), expected[name].bfloat16().view(torch.int16)), name
    changed = json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == changed
    assert verify(source, tmp_path / "megatron", torch.bfloat16)["problems"] == []
    assert "--dtype" in verify(source, tmp_path / "megatron")["problems"][-1]


def test_the_real_8b_shape_is_planned_at_once(tmp_path):
    """The true configuration with its 16 GB of weights as holes in sparse files: only headers are read."""
    import time

    config = DENSE | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    }  # fmt: skip
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(Architecture.from_pretrained(source))
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    encoded = json.dumps(header).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    start = time.monotonic()
    plan = ToMegatron(source, tmp_path / "megatron").describe()
    assert time.monotonic() - start < 2
    assert "8.19B parameters" in plan and "16.38 GB to write" in plan and "36 layers" in plan
