"""`verify` catches any single corruption of either side and names what is wrong."""

import json
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.hf.convert import ToHF, ToMegatron
from megatron_egrsd.hf.verify import verify
from tests.random_checkpoints import DENSE, MOE, random_qwen3

SHARD = 4000


@pytest.fixture(scope="module", params=[DENSE, MOE], ids=["dense", "moe"])
def pair(request, tmp_path_factory):
    """Return (Hugging Face checkpoint in several shards, Megatron checkpoint) of the same model."""
    root = tmp_path_factory.mktemp("pair")
    # hidden = heads x head_dim: transposing the output projection does not change its shape.
    hf = random_qwen3(root / "hf", base=request.param, shard_bytes=SHARD, hidden_size=24, tie_word_embeddings=False)
    ToMegatron(hf, root / "megatron").run()
    return hf, root / "megatron"


@pytest.fixture
def copies(pair, tmp_path):
    for source, name in zip(pair, ("hf", "megatron"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "hf", tmp_path / "megatron"


def findings(hf, megatron) -> str:
    """Return the findings of verify, or the error that it raises."""
    try:
        return " ".join(verify(hf, megatron)["problems"])
    except (BadArgument, RunError) as error:
        return str(error)


def test_the_untouched_pair_has_no_findings(pair):
    assert findings(*pair) == ""


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.heavy
def test_any_flipped_bit_is_caught(pair, data):
    """Flip any byte of any file on the Megatron side, any byte of a tensor on the Hugging Face side."""
    hf, megatron = pair
    file = data.draw(
        st.sampled_from(
            sorted(f for side in (megatron.rglob("*"), hf.glob("*.safetensors")) for f in side if f.is_file())
        )
    )
    content = file.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else 0
    position = data.draw(st.integers(first, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(flipped)
        assert findings(hf, megatron), f"bit {position} of {file.name}"
    finally:
        file.write_bytes(content)


def _shard_of(hf, name):
    return hf / json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"][name]


def _edit(hf, name, change) -> None:
    """Replace a stored tensor."""
    file = _shard_of(hf, name)
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


def test_transposed_tensor(copies):
    _edit(copies[0], O_PROJ.format(1), lambda t: t.T.contiguous())
    assert O_PROJ.format(1) in findings(*copies)


def test_one_value_and_one_sign_of_zero(copies):
    def flip(tensor):
        tensor[3, 5] = -tensor[3, 5]
        return tensor

    _edit(copies[0], O_PROJ.format(0), flip)
    found = findings(*copies)
    assert O_PROJ.format(0) in found and "of 576 values" in found


def test_swapped_layers(copies):
    first, second = (load_file(_shard_of(copies[0], O_PROJ.format(i)))[O_PROJ.format(i)] for i in (0, 2))
    _edit(copies[0], O_PROJ.format(0), lambda t: second)
    _edit(copies[0], O_PROJ.format(2), lambda t: first)
    found = findings(*copies)
    assert O_PROJ.format(0) in found and O_PROJ.format(2) in found and O_PROJ.format(1) not in found


def test_renamed_missing_and_duplicated_tensors_of_the_index(copies):
    index = copies[0] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = O_PROJ.format(1)
    shard = content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    assert f"holds {name}, which" in findings(*copies)
    renamed = content["weight_map"] | {"model.layers.1.renamed": shard}
    index.write_text(json.dumps({"weight_map": renamed}))
    assert f"holds {name}, which" in findings(*copies)
    index.write_text(json.dumps({"weight_map": renamed | {name: shard}}))
    assert "has the unknown tensor model.layers.1.renamed" in findings(*copies)
    other = next(s for s in content["weight_map"].values() if s != shard)
    save_file(load_file(copies[0] / other) | {name: torch.zeros(2)}, copies[0] / other)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: shard}}))
    assert name in findings(*copies) and "duplicated" in findings(*copies)


def test_an_index_cannot_point_elsewhere(copies):
    index = copies[0] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    for elsewhere in (f"../{copies[0].name}/{shard}", str(copies[0] / shard), f"./{shard}"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: elsewhere}}))
        with pytest.raises(BadArgument, match="must lie beside it"):
            HFCheckpoint(copies[0])


def test_dropped_and_truncated_shards(copies):
    shard = _shard_of(copies[0], O_PROJ.format(1))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert shard.name in findings(*copies)
    shard.unlink()
    assert shard.name in findings(*copies)
    shard.write_bytes(content)
    data = copies[1] / "release" / "__0_0.distcp"
    data.unlink()
    assert data.name in findings(*copies)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja", "config.json"])
def test_files_beside_the_weights(name, copies):
    file = copies[1] / "huggingface" / name
    file.write_text(file.read_text().replace("1e-06", "1e-05") + "\n")
    assert name in findings(*copies)
    file.unlink()
    assert name in findings(*copies)


# The checkpoints below have no integrity.json, as after megatron-core's own save: only the tensors show the damage.

KEY = "decoder.layers.self_attention.linear_proj.weight"


def _metadata(megatron, change) -> None:
    """Edit `.metadata` of a checkpoint without a manifest."""
    (megatron / "release" / "integrity.json").unlink()
    file = megatron / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def _index(layer):
    return MetadataIndex(KEY, (layer, 0, 0))


def test_swapped_layers_in_megatron(copies):
    def swap(metadata):
        data = metadata.storage_data
        data[_index(0)], data[_index(2)] = data[_index(2)], data[_index(0)]

    _metadata(copies[1], swap)
    found = findings(*copies)
    assert O_PROJ.format(0) in found and O_PROJ.format(2) in found and O_PROJ.format(1) not in found


def test_missing_and_extra_tensors_in_megatron(copies):
    def rename(metadata):
        metadata.state_dict_metadata["decoder.layers.renamed"] = metadata.state_dict_metadata.pop(KEY)
        for layer in range(3):
            place = MetadataIndex("decoder.layers.renamed", (layer, 0, 0))
            metadata.storage_data[place] = metadata.storage_data.pop(_index(layer))

    _metadata(copies[1], rename)
    found = findings(*copies)
    assert f"{KEY} is missing" in found and "decoder.layers.renamed is not a tensor" in found
    with pytest.raises(RunError, match="linear_proj"):
        ToHF(copies[1], copies[1].with_name("never"))


def test_gate_without_up_is_named(copies):
    """megatron-core's singleton_local_shards store the two apart."""

    def tear(metadata):
        key = next(key for key in metadata.state_dict_metadata if key.endswith("linear_fc1.weight"))
        metadata.state_dict_metadata[f"{key}_w"] = metadata.state_dict_metadata.pop(key)
        for place in [place for place in metadata.storage_data if place.fqn == key]:
            new = MetadataIndex(f"{key}_w", place.offset)
            metadata.storage_data[new] = metadata.storage_data.pop(place)

    _metadata(copies[1], tear)
    found = findings(*copies)
    assert "linear_fc1.weight is missing" in found and "linear_fc1.weight_w is not a tensor" in found


def test_the_router_norm_under_the_name_of_local_layers(tmp_path):
    """megatron-core's local layers store a mixture's second norm as if it were fused with an MLP."""
    hf = random_qwen3(tmp_path / "hf", base=MOE)
    ToMegatron(hf, tmp_path / "megatron").run()

    def rename(metadata):
        old, new = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
        for layer in range(3):
            metadata.storage_data[MetadataIndex(new, (layer, 0))] = metadata.storage_data.pop(
                MetadataIndex(old, (layer, 0))
            )

    _metadata(tmp_path / "megatron", rename)
    report = verify(hf, tmp_path / "megatron")
    assert report["problems"] == []
    where = {row["name"]: row["megatron"] for row in report["tensors"]}
    norm = "model.layers.2.post_attention_layernorm.weight"
    assert where[norm] == "decoder.layers.mlp.linear_fc1.layer_norm_weight[2]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.chunks.pop(1), "lacks chunks"),
        (lambda t: t.chunks.append(t.chunks[1]), "duplicated"),
        (lambda t: setattr(t.chunks[1], "sizes", torch.Size((1, 24, 25))), "outside its shape"),
        (lambda t: setattr(t, "size", torch.Size((3, 24, 23))), "config.json implies"),
        (lambda t: setattr(t, "size", torch.Size((3, 24, 25))), "config.json implies"),
    ],
)  # fmt: skip
def test_missing_duplicated_and_misshapen_chunks(change, message, copies):
    _metadata(copies[1], lambda metadata: change(metadata.state_dict_metadata[KEY]))
    found = findings(*copies)
    assert KEY in found and message in found


def test_a_head_that_is_not_the_embedding_of_a_tied_model_is_refused(tmp_path):
    source = random_qwen3(tmp_path / "hf", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[0, 0] += 1
    save_file(weights | {"lm_head.weight": head}, source / "model.safetensors")
    with pytest.raises(BadArgument, match=r"lm_head.weight .* differs from model.embed_tokens.weight"):
        ToMegatron(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
