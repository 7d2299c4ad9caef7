"""`megatron-egrsd convert`, and tools/convert_hf.py: exit status, one sentence on stderr, nothing half-written."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import run_command
from tests.random_checkpoints import files, random_qwen3

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_hf.py"
convert = functools.partial(run_command, "convert")


def convert_apart(*arguments, **options) -> subprocess.CompletedProcess:
    """Run tools/convert_hf.py, an old name that must keep working, in a process of its own."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def refused(result: subprocess.CompletedProcess, status: int, *words: str) -> None:
    """Check the exit status, and that stderr is one line that contains `words`."""
    assert result.returncode == status, result.stderr
    assert re.fullmatch(r"(megatron-egrsd|convert_hf): error: .*\n", result.stderr), result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def hf(tmp_path):
    return random_qwen3(tmp_path / "hf")


@pytest.mark.heavy
def test_there_verified_and_back(hf, tmp_path):
    megatron, again, report = tmp_path / "out" / "megatron", tmp_path / "again", tmp_path / "report.json"
    result = convert_apart("to-megatron", "--hf-path", hf, "--megatron-path", megatron)
    assert result.returncode == 0 and "3 layers" in result.stdout and "B/s" in result.stderr
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "release"
    result = convert("verify", "--hf-path", hf, "--megatron-path", megatron, "--report", report)
    assert result.returncode == 0 and "35 tensors are the same" in result.stdout, result.stderr
    rows = json.loads(report.read_text())["tensors"]
    assert len(rows) == 35 and all(row["sha256_hf"] == row["sha256_megatron"] for row in rows)
    assert convert("to-hf", "--megatron-path", megatron, "--hf-path", again, "--quiet").returncode == 0
    assert (again / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert files(again) == files(hf)
    refused(convert("to-hf", "--megatron-path", megatron, "--hf-path", again), 2, "again exists already")
    refused(convert("to-megatron", "--hf-path", hf, "--megatron-path", megatron), 2, "megatron exists already")


def test_a_checkpoint_without_the_models_files_takes_those_of_another_directory(hf, tmp_path):
    megatron, arguments = tmp_path / "m", ("--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "again")
    assert convert("to-megatron", "--hf-path", hf, "--megatron-path", megatron, "--quiet").returncode == 0
    shutil.rmtree(megatron / "huggingface")
    refused(convert("to-hf", *arguments), 2, "name with --like")
    assert (result := convert("to-hf", *arguments, "--like", hf, "--quiet")).returncode == 0, result.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert files(tmp_path / "again") == files(hf)


def test_verify_fails_by_name(hf, tmp_path):
    assert convert("to-megatron", "--hf-path", hf, "--megatron-path", tmp_path / "m", "--quiet").returncode == 0
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][3] = 7
    save_file(tensors, hf / "model.safetensors")
    result = convert("verify", "--hf-path", hf, "--megatron-path", tmp_path / "m", "--quiet")
    refused(result, 1, "model.norm.weight differs from decoder.final_layernorm.weight", "1 of 16 values")


@pytest.mark.parametrize("says", [None, "bfloat16", "float32"])
def test_a_conversion_verifies_whatever_type_the_models_config_says(says, tmp_path):
    hf, megatron = random_qwen3(tmp_path / "hf", dtype=torch.float32), tmp_path / "m"
    config = json.loads((hf / "config.json").read_text()) | {"torch_dtype": says}
    text = json.dumps({key: value for key, value in config.items() if value is not None}).replace(", ", ",\r\n")
    (hf / "config.json").write_bytes(text.encode())
    assert convert("to-megatron", "--hf-path", hf, "--megatron-path", megatron, "--quiet").returncode == 0
    arguments = ("verify", "--hf-path", hf, "--megatron-path", megatron, "--quiet")
    assert (result := convert(*arguments)).returncode == 0, result.stderr
    carried = megatron / "huggingface" / "config.json"
    carried.write_text(carried.read_text().replace("1e-06", "1E-06"))
    refused(convert(*arguments), 1, "config.json differs")


def test_a_directory_beside_the_checkpoint_is_not_its_own(hf, tmp_path, monkeypatch):
    """/models/huggingface was taken for the files that /models/run carries, and `.` for a checkpoint without any."""
    megatron, arguments = tmp_path / "m", ("--hf-path", hf, "--quiet", "--megatron-path")
    assert convert("to-megatron", *arguments, megatron).returncode == 0
    for own in ("huggingface", "conversion.json"):
        (megatron / own).rename(tmp_path / own)
    for path in (megatron, megatron / "release"):
        assert (result := convert("verify", *arguments, path)).returncode == 0, result.stderr
    for own in ("huggingface", "conversion.json"):
        (tmp_path / own).rename(megatron / own)
    _edit_config(hf, transformers_version="5.0.0")
    monkeypatch.chdir(megatron / "release")
    refused(convert("verify", *arguments, "."), 1, "config.json differs")


def test_dry_run_writes_nothing(hf, tmp_path):
    result = convert(
        "to-megatron", "--hf-path", hf, "--megatron-path", tmp_path / "m", "--dry-run", "--dtype", "float32"
    )
    assert result.returncode == 0 and "GB free" in result.stdout and "bfloat16 -> float32" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def _edit_config(hf, **changes):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))


def _truncate(hf):
    with open(hf / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)


def _mixed_types(hf):
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, hf / "model.safetensors")


BAD_INPUT = {
    "unknown architecture": (lambda hf: _edit_config(hf, architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
    "truncated shard": (_truncate, "model.safetensors cannot be read"),
    "too few layers in the config": (lambda hf: _edit_config(hf, num_hidden_layers=2), "model.layers.2"),
    "too many layers in the config": (lambda hf: _edit_config(hf, num_hidden_layers=4), "lacks model.layers.3"),
    "another vocabulary": (lambda hf: _edit_config(hf, vocab_size=62), "model.embed_tokens.weight"),
    "untied in the config only": (lambda hf: _edit_config(hf, tie_word_embeddings=False), "lacks lm_head.weight"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "holds neither"),
    "no config": (lambda hf: (hf / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda hf: (hf / "config.json").write_text("{"), "not valid JSON"),
    "mixed types": (_mixed_types, "model.norm.weight"),
    "dense layers among experts": (
        lambda hf: _edit_config(hf, architectures=["Qwen3MoeForCausalLM"], mlp_only_layers=[0]), "mixes dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_nothing_is_written(case, hf, tmp_path):
    break_it, words = BAD_INPUT[case]
    break_it(hf)
    refused(convert("to-megatron", "--hf-path", hf, "--megatron-path", tmp_path / "m"), 2, words)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_bad_arguments(hf, tmp_path):
    refused(convert("to-megatron", "--hf-path", hf), 2, "--megatron-path")
    refused(
        convert("to-megatron", "--hf-path", tmp_path / "none", "--megatron-path", tmp_path / "m"), 2, "does not exist"
    )
    refused(convert("to-hf", "--megatron-path", hf, "--hf-path", tmp_path / "x"), 2, "not a Megatron checkpoint")
    refused(convert("to-hf", "--megatron-path", hf, "--hf-path", tmp_path / "x", "--shard-size", "-1"), 2, "positive")
    refused(convert("to-hf", "--megatron-path", hf, "--hf-path", tmp_path / "x", "--shard-size", "inf"), 2, "finite")


@pytest.mark.heavy
def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails midway."""
    hf = random_qwen3(tmp_path / "hf", vocab_size=40000)
    limit = 1 << 20

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ("to-megatron", "--hf-path", hf, "--megatron-path", tmp_path / "m", "--quiet")
    refused(convert_apart(*arguments, preexec_fn=limited), 1, "no room to write")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert convert(*arguments).returncode == 0
    arguments = ("to-hf", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "again", "--quiet")
    refused(convert_apart(*arguments, preexec_fn=limited), 1, "no room to write")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m"]


def test_too_little_space_is_said_before_the_first_byte(hf, tmp_path, monkeypatch):
    from megatron_egrsd.errors import RunError
    from megatron_egrsd.hf import convert, staging

    monkeypatch.setattr(staging, "free_bytes", lambda path: 1000)
    with pytest.raises(RunError, match="GB free, but"):
        convert.ToMegatron(hf, tmp_path / "m").run()
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.heavy
def test_an_interrupted_run_leaves_nothing_that_looks_finished(how, tmp_path):
    hf = random_qwen3(tmp_path / "hf", vocab_size=3_000_000, dtype=torch.float32)  # 190 MB
    target, partial = tmp_path / "m", tmp_path / "m.partial"
    command = [
        sys.executable,
        str(TOOL),
        "to-megatron",
        "--hf-path",
        str(hf),
        "--megatron-path",
        str(target),
        "--quiet",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (partial / "release").is_dir() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    _, message = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), message
    assert not target.exists()
    if how == signal.SIGINT:
        assert not partial.exists() and "interrupted" in message
    else:
        assert convert("to-hf", "--megatron-path", partial, "--hf-path", tmp_path / "x").returncode == 2
    assert convert(*command[2:]).returncode == 0
    assert target.is_dir() and not partial.exists()


def test_two_runs_to_one_place_do_not_meet(hf, tmp_path):
    from megatron_egrsd.errors import BadArgument
    from megatron_egrsd.hf.convert import ToMegatron
    from megatron_egrsd.hf.staging import staged

    with (
        staged(tmp_path / "m") as first,
        pytest.raises(BadArgument, match="another process is writing"),
    ):
        (first / "file").touch()
        ToMegatron(hf, tmp_path / "m").run()
    assert (tmp_path / "m" / "file").exists()


def test_a_failure_keeps_its_reason_if_the_place_is_gone(tmp_path):
    from megatron_egrsd.errors import RunError
    from megatron_egrsd.hf.staging import staged

    with pytest.raises(RunError, match="the reason"), staged(tmp_path / "m") as directory:
        directory.rmdir()
        raise RunError("the reason")


def test_a_place_within_the_source_is_refused(hf, tmp_path):
    refused(convert("to-megatron", "--hf-path", hf, "--megatron-path", hf / "mcore"), 2, "lies within the source")
    (tmp_path / "file").touch()
    refused(convert("to-megatron", "--hf-path", hf, "--megatron-path", tmp_path / "file" / "m"), 2, "is a file")


def test_an_export_says_its_type_and_carries_the_models_own_files_alone(hf, tmp_path):
    """config.json said bfloat16 of weights trained in float32: transformers rounded them."""
    from megatron_egrsd.hf.checkpoint import HFCheckpoint, save_hf

    _edit_config(hf, torch_dtype="bfloat16", dtype="bfloat16")
    (hf / "rl" / "checkpoints" / "step_000001").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml", "checkpoints/step_000001/__0_0.distcp"):
        (hf / "rl" / name).write_text("")
    (hf / "figures").mkdir()
    (hf / "figures" / "curve.svg").write_text("")
    checkpoint = HFCheckpoint(hf)
    save_hf(((name, checkpoint[name].float()) for name in checkpoint.names()), hf, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert not (tmp_path / "out" / "rl").exists() and (tmp_path / "out" / "figures" / "curve.svg").exists()
    save_hf(((name, checkpoint[name].bfloat16()) for name in checkpoint.names()), hf, tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
