"""Adapters in PEFT's format: what PEFT writes is read, what we write loads in PEFT, and a merge is PEFT's."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_egrsd import cli
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.adapter_file import CONFIG, WEIGHTS, AdapterFile, read_spec, save_adapter
from megatron_egrsd.hf.adapters import AdapterSpec, adapted_weights, adapter_shapes, merged
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.hf.merge import Merge
from tests.adapters import random_adapter
from tests.models import make_model, make_qwen3

SPEC = AdapterSpec(4, 6.0, TARGETS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_qwen3(tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.fixture
def adapter(base, tmp_path):
    return random_adapter(tmp_path / "adapter", base, SPEC)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 33)[None]).logits


def load_hf(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def peft_model(base, adapter):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys and tensors that it does not know or misses
        return PeftModel.from_pretrained(load_hf(base), adapter)


@pytest.mark.heavy
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",)], ids=",".join)
def test_what_peft_writes_is_read(base, tmp_path, targets):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_hf(base), LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), lora_dropout=0.1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "peft")
    file = AdapterFile(tmp_path / "peft", Architecture.from_pretrained(base))
    assert file.spec == read_spec(tmp_path / "peft") == AdapterSpec(3, 5.0, targets)
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    assert file.shapes.keys() == stored.keys()
    assert all(torch.equal(file[name], tensor) for name, tensor in stored.items())


@pytest.mark.heavy
@pytest.mark.parametrize("targets", [TARGETS, ATTENTION, ("up_proj", "k_proj")], ids=",".join)
def test_what_is_written_loads_in_peft_and_a_merge_is_the_same_model(base, tmp_path, targets):
    adapter = random_adapter(tmp_path / "adapter", base, AdapterSpec(4, 6.0, targets))
    served = logits(peft_model(base, adapter))
    Merge(base, adapter, tmp_path / "merged").run()
    assert (served - logits(load_hf(base))).abs().max() > 0.1
    torch.testing.assert_close(logits(load_hf(tmp_path / "merged")), served, rtol=0, atol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_merge_of_another_family_is_the_same_model(family, tmp_path):
    base = make_model(tmp_path / "base", family, num_hidden_layers=2)
    adapter = random_adapter(tmp_path / "adapter", base, SPEC)
    Merge(base, adapter, tmp_path / "merged").run()
    served = logits(peft_model(base, adapter))
    torch.testing.assert_close(logits(load_hf(tmp_path / "merged")), served, rtol=0, atol=1e-5)


@pytest.mark.heavy
def test_a_merge_is_pefts_up_to_its_rounding_and_leaves_the_rest_bit_for_bit(base, adapter, tmp_path):
    Merge(base, adapter, tmp_path / "merged").run()
    theirs = peft_model(base, adapter).merge_and_unload().state_dict()
    ours, before = HFCheckpoint(tmp_path / "merged"), HFCheckpoint(base)
    adapted = adapted_weights(before.architecture, SPEC)
    assert len(adapted) == 14
    for name in ours.names():
        if name in adapted:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(ours[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_merge_to_the_bits_of_the_whole(dtype):
    torch.manual_seed(0)
    weight, a, b = torch.randn(1536, 512).to(dtype), torch.randn(64, 512).to(dtype), torch.randn(1536, 64).to(dtype)
    whole = merged(weight, a, b, 2.0)
    exact = weight.double() + 2.0 * b.double() @ a.double()
    assert torch.equal(whole, exact.to(dtype))
    for size in (2, 4, 8):
        rows = [merged(w, a, s, 2.0) for w, s in zip(weight.chunk(size), b.chunk(size), strict=True)]
        columns = [merged(w, s, b, 2.0) for w, s in zip(weight.chunk(size, 1), a.chunk(size, 1), strict=True)]
        assert torch.equal(torch.cat(rows), whole) and torch.equal(torch.cat(columns, 1), whole)


def change(adapter, **values) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"use_dora": True}, "sets use_dora to True, which is not supported"),
        ({"use_rslora": True}, "sets use_rslora to True"),
        ({"bias": "lora_only"}, "sets bias to 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"sets modules_to_save to \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 8}}, "sets rank_pattern"),
        ({"layers_to_transform": [1]}, "sets layers_to_transform"),
        ({"an_option_of_tomorrow": {"x": 1}}, "sets an_option_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights to 'pissa', which changes the base model"),
        ({"peft_type": "IA3"}, "describes peft_type 'IA3'; only LORA"),
        ({"r": 0}, "has r = 0; it must be a positive integer"),
        ({"r": True}, "has r = True"),
        ({"lora_alpha": None}, "has lora_alpha = None"),
        ({"lora_alpha": float("nan")}, "has lora_alpha = nan"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has target_modules = .* a list of names among q_proj"),
        ({"target_modules": ".*proj"}, "has target_modules = '.*proj'"),
        ({"r": 5}, r"lora_A.weight in .* has shape \[4, 64\], but the model and r = 5 imply \[5, 64\]"),
        ({"target_modules": ["q_proj"]}, r"has the unknown tensor .* \(0 missing, 24 unknown\)"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_is_no_plain_lora_of_the_model_is_refused(base, adapter, values, reason):
    change(adapter, **values)
    with pytest.raises(BadArgument, match=reason):
        AdapterFile(adapter, Architecture.from_pretrained(base))


def test_an_adapter_that_eva_has_initialised_is_plain_lora(base, adapter):
    """PEFT writes its settings beside; the ranks are those of `r` if rank_pattern is empty."""
    from peft import EvaConfig, LoraConfig

    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)).to_dict()
    assert config["eva_config"] and not config["rank_pattern"]
    change(adapter, **{key: config[key] for key in ("init_lora_weights", "eva_config", "rank_pattern")})
    assert AdapterFile(adapter, Architecture.from_pretrained(base)).spec == SPEC


def test_damaged_files_are_refused(base, adapter, tmp_path):
    arch = Architecture.from_pretrained(base)
    tensors = load_file(adapter / WEIGHTS)
    (name, *_) = tensors
    save_file({k: t for k, t in tensors.items() if k != name}, adapter / WEIGHTS)
    with pytest.raises(BadArgument, match=rf"lacks {name} \(1 missing, 0 unknown\)"):
        AdapterFile(adapter, arch)
    save_file({k: t.to(torch.float64) for k, t in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(BadArgument, match="is F64; one of BF16, F16, F32 is supported"):
        AdapterFile(adapter, arch)
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(BadArgument, match="is truncated or not safetensors"):
        AdapterFile(adapter, arch)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(BadArgument, match=r"holds no adapter_model\.safetensors"):
        AdapterFile(adapter, arch)
    for content, reason in (("{", "is not valid JSON"), ("[]", "is not a JSON object")):
        (adapter / CONFIG).write_text(content)
        with pytest.raises(BadArgument, match=reason):
            AdapterFile(adapter, arch)
    with pytest.raises(BadArgument, match=r"holds no adapter_config.json, so it is not an adapter in PEFT's format"):
        AdapterFile(base, arch)


def test_an_incomplete_export_leaves_nothing(base, tmp_path):
    shapes = adapter_shapes(Architecture.from_pretrained(base), SPEC)
    tensors = [(name, torch.zeros(shape)) for name, shape in shapes.items()]
    with pytest.raises(RunError, match="the export ended before"):
        save_adapter(tensors[:-1], SPEC, base, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    save_adapter(tensors, SPEC, base, tmp_path / "new")
    with pytest.raises(BadArgument, match="exists already"):
        save_adapter(tensors, SPEC, base, tmp_path / "new")


def test_merge_from_the_command_line(base, adapter, tmp_path, capsys):
    words = ["convert", "merge", "--hf-path", str(base), "--adapter", str(adapter), "--quiet"]
    out = tmp_path / "merged"
    assert cli.main([*words, "--output", str(out), "--dry-run"]) == 0 and not out.exists()
    assert "r 4, alpha 6, q_proj" in (text := capsys.readouterr().out) and "14 of 24 tensors change" in text
    assert cli.main([*words, "--output", str(out), "--dtype", "bfloat16"]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    rounded, checkpoint, file = (
        HFCheckpoint(out),
        HFCheckpoint(base),
        AdapterFile(adapter, HFCheckpoint(base).architecture),
    )
    for name, (a, b) in adapted_weights(checkpoint.architecture, SPEC).items():
        whole = checkpoint[name].double() + SPEC.scale * file[b].double() @ file[a].double()
        assert torch.equal(rounded[name], whole.bfloat16()), name
    capsys.readouterr()
    assert cli.main([*words, "--output", str(out)]) == 2 and "exists already" in capsys.readouterr().err


def test_a_head_stored_beside_its_embedding_stays(adapter, base, tmp_path):
    tied = tmp_path / "tied"
    tied.mkdir()
    (tied / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tied / "model.safetensors")
    merge, done = Merge(tied, adapter, tmp_path / "merged"), []
    merge.run(done.append)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert merge.nbytes == sum(done) == sum(tensor.nbytes for tensor in stored.values())
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, tied / "model.safetensors")
    with pytest.raises(BadArgument, match=r"differs from model.embed_tokens.weight"):
        Merge(tied, adapter, tmp_path / "again")


def test_bad_places_of_a_merge_are_refused_by_its_dry_run(base, adapter, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = ["convert", "merge", "--hf-path", str(base), "--adapter", str(adapter), "--dry-run"]
    for output, reason in ((base / "merged", "lies within the source"), (tmp_path / "file" / "merged", "is a file")):
        assert cli.main([*words, "--output", str(output)]) == 2
        assert reason in capsys.readouterr().err


def test_a_merge_names_the_type_of_its_weights(base, adapter, tmp_path):
    """config.json said bfloat16 of weights in float32: transformers rounds such a model."""
    wrong = tmp_path / "wrong"
    shutil.copytree(base, wrong)
    config = json.loads((base / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    Merge(wrong, adapter, tmp_path / "merged").run()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    Merge(base, adapter, tmp_path / "same").run()
    assert (tmp_path / "same" / "config.json").read_bytes() == (base / "config.json").read_bytes()
