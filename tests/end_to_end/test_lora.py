"""Runs that train adapters, from the command line: live through SGLang, replayed, resumed, evaluated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_egrsd.hf.adapter_file import AdapterFile
from megatron_egrsd.hf.adapters import adapted_weights
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.hf.merge import Merge
from tests.end_to_end.test_train import ROOT, metrics, run

BASE = ROOT / "examples/tiny/model"
LORA = {"lora.rank": 4, "rollout.sync.verify": "true", "dump_scores": "false", "evaluation.at_start": "false",
        "data.evaluation": "", "optimizer.lr": "1e-2"}  # fmt: skip

pytestmark = pytest.mark.timeout(600)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    file = AdapterFile(output / "adapter", HFCheckpoint(BASE).architecture)
    return {name: file[name] for name in file.shapes}


def same(one: Path, other: Path) -> bool:
    left, right = adapter(one), adapter(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Path:
    """Three steps through SGLang, with merged weights; every weight compared after every push."""
    output = tmp_path_factory.mktemp("lora") / "live"
    done = run(output, **LORA, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_a_live_run_samples_with_its_adapter_and_exports_it(live, tmp_path):
    steps = [m for m in metrics(live) if "loss/policy" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert all(m["sync/log_prob_difference"] < 1e-5 and m["optimizer/grad_norm"] > 0 for m in steps)
    base, trained = HFCheckpoint(BASE), HFCheckpoint(live / "hf")
    adapted = adapted_weights(base.architecture, AdapterFile(live / "adapter", base.architecture).spec)
    assert len(adapted) == 7 * base.architecture.num_layers
    for name in base.names():
        assert torch.equal(trained[name], base[name]) == (name not in adapted), name
    Merge(BASE, live / "adapter", tmp_path / "merged").run()
    merged = HFCheckpoint(tmp_path / "merged")
    assert all(torch.equal(merged[name], trained[name]) for name in base.names())


def test_replayed_and_resumed_it_is_the_same_adapter(live, tmp_path):
    """In one process and, resumed, in two: rank 0 writes what a run without interruption writes."""
    replay = {**LORA, "debug": "train-only", "replay": live / "rollouts", "lora.export": "adapter"}
    done = run(tmp_path / "replayed", **replay, **{"checkpoint.every": 1, "checkpoint.keep": 3})
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(live, tmp_path / "replayed") and not (tmp_path / "replayed/hf").exists()
    (second,) = (tmp_path / "replayed/checkpoints").glob("*2")
    size = sum(file.stat().st_size for file in second.rglob("*") if file.is_file())
    assert size < (BASE / "model.safetensors").stat().st_size  # a full checkpoint has three times as much
    done = run(tmp_path / "resumed", **replay, **{"checkpoint.resume": second})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [m["step"] for m in metrics(tmp_path / "resumed")][-1] == 3 and same(live, tmp_path / "resumed")


@pytest.mark.slow
def test_adapters_served_by_sglang_and_an_evaluation_of_one(live, tmp_path):
    served = {**LORA, "rollout.sync.lora": "adapter", "rollout.sync.transport": "ipc", "lora.init": live / "adapter"}
    done = run(tmp_path / "served", **{**served, "lora.rank": 0}, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [m for m in metrics(tmp_path / "served") if "loss/policy" in m]
    assert len(steps) == 3 and all(m["sync/log_prob_difference"] < 1e-5 for m in steps)
    problems = tmp_path / "few.jsonl"
    problems.write_text("".join((ROOT / "examples/tiny/heldout.jsonl").read_text().splitlines(keepends=True)[:8]))
    words = {"model.path": BASE, "model.dtype": "float32", "lora.init": live / "adapter", "output": tmp_path / "out",
             "rollout.max_response_tokens": 60, "rollout.servers.max_total_tokens": 16384,
             "evaluation.rollouts_per_problem": 2}  # fmt: skip
    command = [sys.executable, "-m", "megatron_egrsd.cli", "evaluate", f"few={problems}"]
    command += [word for key, value in words.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "merging" in done.stdout and json.loads((tmp_path / "out/results.json").read_text())["adapter"]
    assert not list((tmp_path / "out").glob(".hf-*"))
