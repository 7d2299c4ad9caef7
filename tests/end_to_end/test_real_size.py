"""One step of the paper's 8B configuration at Qwen3-0.6B's shape, with Qwen3's own tokenizer and random weights.

Needs 14 GiB of memory, and npm for the tokenizer. The model knows nothing: what is tested is that real sizes, a real
vocabulary and real text go through sampling, both readers, the update, the weight sync and the export.
"""

import json
import math
import shutil

import pytest

from megatron_egrsd.data.samples import load_rollouts
from megatron_egrsd.report.scored_dump import load_scores
from tests.end_to_end.test_train import ROOT, metrics, run
from tests.models import make_qwen3
from tests.qwen3_tokenizer import FILES, qwen3_tokenizer

QWEN3_06B = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TWO_TURNS = [
    {"role": "user", "content": "Problem: {problem}"},
    {"role": "assistant", "content": "{solution}"},
    {"role": "user", "content": "Now solve it again, and put the final answer within \\boxed{}."},
]


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    tokenizer = qwen3_tokenizer(request.config.cache.mkdir("qwen3"))
    path = make_qwen3(tmp_path_factory.mktemp("real") / "model", **QWEN3_06B)
    for name in FILES:
        shutil.copy(tokenizer / name, path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_step_at_the_shape_of_qwen3_06b(model, tmp_path):
    output, problems = tmp_path / "run", (ROOT / "tests/data/gsm8k_test.jsonl").read_text().splitlines()[:4]
    (tmp_path / "problems.jsonl").write_text("\n".join(problems) + "\n")
    done = run(
        output,
        config="examples/configs/qwen3_8b_cl_egrsd.yaml",
        timeout=1400,
        **{
            "model.path": model,
            "model.dtype": "float32",  # a CPU without bf16 instructions takes minutes for 95 tokens in bf16
            "data.train": tmp_path / "problems.jsonl",
            "data.problem_key": "question",
            "data.solution_key": "answer",
            "data.teacher_template": json.dumps(TWO_TURNS),
            "data.max_prompt_tokens": 1024,
            "parallel.tensor": 1,
            "parallel.sequence_parallel": "false",
            "parallel.max_tokens_per_microbatch": 2048,
            "rollout.rollouts_per_prompt": 1,
            "rollout.max_response_tokens": 12,
            "rollout.servers.start_timeout": 600,
            "rollout.servers.health_timeout": 600,  # a first prefill takes a busy CPU a minute
            "evaluation.every": 0,
            "evaluation.at_start": "false",
            "steps": 2,
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [m for m in metrics(output) if "loss/policy" in m]
    assert len(steps) == 2 and all(m["optimizer/grad_norm"] > 0 for m in steps)
    # Before the first update, and after it was sent to SGLang.
    assert all(m["sync/log_prob_difference"] < 1e-4 for m in steps)

    rollouts = load_rollouts(output / "rollouts" / "step_000002.jsonl")
    scored = load_scores(output / "scores" / "step_000002.jsonl")
    assert {r.weight_version for r in rollouts} == {1}
    for rollout, scores in zip(rollouts, scored, strict=True):
        assert "".join(scores.pieces).removesuffix("<|im_end|>") == rollout.text
        assert abs(scores.student_log_prob - scores.rollout_log_prob).max() < 1e-3
        assert scores.teacher_entropy.max() < math.log(151_936) + 1e-3
    exported = output / "hf"
    assert all((exported / name).read_bytes() == (model / name).read_bytes() for name in FILES)
