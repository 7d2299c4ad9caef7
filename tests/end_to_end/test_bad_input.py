"""A run that cannot work is refused before anything is started: one sentence, exit status 2, nothing written."""

import json
import shutil
import socket

import pytest

from megatron_egrsd.cli import main
from tests.end_to_end.test_train import CONFIG, ROOT


def rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run `train` in this process; returns the reason after checking that nothing was started or written."""
    monkeypatch.chdir(ROOT)

    def run(*overrides: object, status: int = 2) -> str:
        output = tmp_path / "run"
        assert main(["train", "--config", CONFIG, "--output", str(output), *map(str, overrides)]) == status
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-egrsd: error: ")]
        assert len(err) == 1
        assert not output.exists()
        return err[0]

    return run


def test_missing_model_directory(refused):
    assert "/no/such/model does not exist" in refused("--model.path", "/no/such/model")


def test_other_architecture(refused, tmp_path):
    model = shutil.copytree(ROOT / "examples/tiny/model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["MistralForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    assert "MistralForCausalLM" in refused("--model.path", model)


def test_truncated_weights(refused, tmp_path):
    model = shutil.copytree(ROOT / "examples/tiny/model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors cannot be read" in refused("--model.path", model)


def test_dataset_without_answers(refused, tmp_path):
    data = rows(tmp_path / "d.jsonl", [{"problem": "1+1=?", "solution": "1+1=2"}])
    reason = refused("--data.train", data)
    assert "line 1" in reason and "answer" in reason


def test_prompt_longer_than_allowed(refused, tmp_path):
    data = rows(tmp_path / "d.jsonl", [{"id": "long", "problem": "1" * 3000, "answer": "2", "solution": "3"}])
    assert "long" in refused("--data.train", data)


def test_response_longer_than_the_context(refused):
    assert "1024" in refused("--rollout.max_response_tokens", 2000)


def test_tensor_parallel_that_does_not_divide_the_heads(refused):
    assert "parallel.tensor = 3 does not divide" in refused("--parallel.tensor", 3)


def test_world_that_does_not_divide(refused):
    assert "torchrun" in refused("--parallel.tensor", 2)


def test_batch_that_does_not_divide(refused):
    assert "updates_per_batch = 3" in refused("--optimizer.updates_per_batch", 3)


def test_unknown_key_names_the_nearest(refused):
    assert "did you mean objective.lookahead?" in refused("--objective.lookahaed", 3)


def test_busy_port(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused("--rollout.servers.port", port)


def test_output_of_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "metrics.jsonl").write_text("precious")
    assert main(["train", "--config", CONFIG, "--output", str(tmp_path)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["train", "--config", CONFIG, "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "128 prompts x 1 rollouts = 128" in out and "padded to 48" in out and "337,152 parameters" in out
    assert not (tmp_path / "run").exists()
