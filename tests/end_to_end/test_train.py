"""The whole loop as a user starts it: real megatron-core, a real SGLang server, real files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.rollout.servers import RolloutServers
from tests.models import make_qwen3
from tests.processes import kill_tree

ROOT = Path(__file__).parents[2]
CONFIG = "examples/configs/tiny_cpu.yaml"
SMALL = {
    "steps": 3, "rollout.prompts_per_step": 4, "rollout.rollouts_per_prompt": 4, "evaluation.rollouts_per_problem": 1,
    "rollout.servers.max_total_tokens": 16384, "dump_rollouts": "true", "rollout.max_response_tokens": 120,
    "dump_scores": "true",
}  # fmt: skip


def command(output: Path, ranks: int = 1, config: str = CONFIG, **overrides) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    words = [w for k, v in {**SMALL, **overrides}.items() for w in (f"--{k}", str(v))]
    return [*launcher, "megatron_egrsd.cli", "train", "--config", config, "--output", str(output), *words]


def run(
    output: Path, ranks: int = 1, timeout: float = 240, config: str = CONFIG, **overrides
) -> subprocess.CompletedProcess:
    """Run training; returns the finished process. On a timeout, kill it and all its descendants, by process id."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(output, ranks, config, **overrides),
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def descendants_with(marker: str) -> list[int]:
    """Return the processes whose command line or environment names the run's directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if marker in " ".join(process.cmdline()) and process.pid != os.getpid():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("new_interpreters")
def test_three_steps_of_the_whole_loop(tmp_path):
    from safetensors.torch import load_file

    output = tmp_path / "run"
    done = run(output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy (avg@1)" in done.stdout and "Traceback" not in done.stderr

    steps = [m for m in metrics(output) if "loss/policy" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    evaluations = [m for m in metrics(output) if "evaluation/right" in m]
    assert [m["step"] for m in evaluations] == [0, 3] and "evaluation/accuracy/change/low" in evaluations[1]
    for m in evaluations:
        assert len(m["evaluation/right"]) == m["evaluation/problems"]
        assert np.mean(m["evaluation/right"]) == pytest.approx(m["evaluation/accuracy"] * m["evaluation/k"])
    # Before any sync (step 1) and after syncs (steps 2, 3) the two engines agree on what was sampled.
    assert all(m["sync/log_prob_difference"] < 1e-5 for m in steps)
    assert all(m["optimizer/grad_norm"] > 0 for m in steps)

    trained, start = (
        load_file(output / "hf" / "model.safetensors"),
        load_file(ROOT / "examples/tiny/model/model.safetensors"),
    )
    assert trained.keys() == start.keys()
    assert all(trained[k].shape == start[k].shape and not trained[k].equal(start[k]) for k in start)
    from megatron_egrsd.data.samples import load_rollouts
    from megatron_egrsd.report.scored_dump import load_scores

    rollouts = load_rollouts(output / "rollouts" / "step_000003.jsonl")
    assert len(rollouts) == 16 and {r.weight_version for r in rollouts} == {2}
    scored = load_scores(output / "scores" / "step_000003.jsonl")
    assert ["".join(r.pieces).removesuffix("<|im_end|>") for r in scored] == [r.text for r in rollouts]
    assert all(abs(r.student_log_prob - r.rollout_log_prob).max() < 1e-4 for r in scored)
    assert (output / "frontier.png").stat().st_size > 10_000
    assert any((output / "tensorboard").iterdir())
    assert not [p for p in output.iterdir() if p.name.endswith(".partial")]
    assert not descendants_with(str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_servers_given_by_url_serve_one_run_after_another(tmp_path):
    """They hold the last run's weights when the next one begins, which sends its own first."""
    config = parse_config(["--config", str(ROOT / CONFIG), "--model.path", str(ROOT / "examples/tiny/model")])
    with RolloutServers(config.rollout.servers, config.model, 0, tmp_path / "logs", key="") as servers:
        for name in ("first", "second"):
            done = run(tmp_path / name, **{"rollout.servers.urls": servers.urls, "evaluation.at_start": "false"})
            assert done.returncode == 0, done.stderr[-3000:]
            steps = [m for m in metrics(tmp_path / name) if "time/step" in m]
            trained = [m["sync/log_prob_difference"] for m in steps if "loss/policy" in m]
            assert len(steps) == 3 and trained and max(trained) < 1e-5
            assert sum("evaluation/accuracy" in m for m in metrics(tmp_path / name)) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tensor_and_pipeline_parallel_ranks_with_a_server_and_disk_sync(tmp_path):
    overrides = {
        "parallel.tensor": 2,
        "parallel.pipeline": 2,
        "parallel.sequence_parallel": "true",
        "rollout.sync.transport": "disk",
    }
    done = run(tmp_path / "run", ranks=4, timeout=500, steps=2, **overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [m for m in metrics(tmp_path / "run") if "loss/policy" in m]
    assert len(steps) == 2 and all(m["sync/log_prob_difference"] < 1e-5 for m in steps)
    assert not descendants_with(str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mixture_of_experts_on_expert_parallel_ranks(tmp_path):
    """Every weight arrives in SGLang's fused experts bit by bit, and both choose the same experts."""
    tiny = ROOT / "examples/tiny/model"
    model = make_qwen3(tmp_path / "model", tied=False, vocab_size=45, num_experts=6, num_hidden_layers=2,
                       moe_intermediate_size=64)  # fmt: skip
    for file in tiny.glob("*token*"):
        shutil.copy(file, model)
    shutil.copy(tiny / "chat_template.jinja", model)
    overrides = {
        "model.path": model,
        "data.reward": "tests.end_to_end.test_train:even_length",
        "parallel.expert": 2,
        "parallel.distributed_optimizer": "true",
        "rollout.sync.verify": "true",
    }
    overrides |= {"rollout.routing_replay": "true", "dump_rollouts": "true"}
    done = run(tmp_path / "run", ranks=2, timeout=400, steps=2, **overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [m for m in metrics(tmp_path / "run") if "loss/policy" in m]
    assert len(steps) == 2 and all(m["sync/log_prob_difference"] < 1e-5 for m in steps)
    assert all(m["sync/routing_changed"] < 1e-3 for m in steps)  # in fp32
    again = {"debug": "train-only", "replay": tmp_path / "run" / "rollouts"}
    done = run(tmp_path / "replay", ranks=2, timeout=100, steps=2, **overrides | again)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (load_file(tmp_path / run / "hf/model.safetensors") for run in ("replay", "run"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def even_length(response: str, answer: str) -> float:
    """A reward that a random model earns every other time."""
    return float(len(response) % 2 == 0)


@pytest.mark.timeout(200)
def test_server_that_dies_at_start(tmp_path):
    done = run(tmp_path / "run", timeout=150, **{"rollout.servers.args": '{"no-such-flag": true}'})
    assert done.returncode == 1
    reason = [line for line in done.stderr.splitlines() if line.startswith("megatron-egrsd: error:")]
    assert len(reason) == 1 and "no-such-flag" in reason[0], done.stderr[-2000:]
    assert not descendants_with(str(tmp_path))
    assert not (tmp_path / "run" / "hf").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ctrl_c_ends_the_server_as_well(tmp_path):
    output = tmp_path / "run"
    process = subprocess.Popen(
        command(output, steps=1000), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (output / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[1][-2000:]
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130
    assert re.search(r"^megatron-egrsd: error: (?:interrupted$|stopped by Ctrl-C; resumable: step )", err, re.M)
    assert not descendants_with(str(tmp_path))
