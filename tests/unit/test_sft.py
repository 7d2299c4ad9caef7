"""SFT: which tokens are trained, which rows are refused, and that nothing is planned that would sample."""

import json

import pytest
from transformers import AutoTokenizer

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.load import check_objective, needs_rollouts
from megatron_egrsd.planning.plan import resolve
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.report.family import title
from tests.parallel.test_algorithm1 import TOKENIZER


def configure(tmp_path, *rows, words=()):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i}+1=?", "answer": "5"} | row) + "\n"
                            for i, row in enumerate(rows)))  # fmt: skip
    base = ["--model.path", str(TOKENIZER), "--data.train", str(data), "--output", str(tmp_path / "run")]
    return parse_config([*base, "--objective.preset", "sft", "--rollout.max_response_tokens", "64", *words])


def test_the_preset_samples_nothing_and_has_a_plan(tmp_path):
    config = configure(tmp_path, {"solution": "2+3=5"})
    check_objective(config.objective)
    assert not needs_rollouts(config.objective) and title(config.objective) == "SFT"
    train, _, _ = prepare(config)
    lines = "\n".join(resolve(config, train, [], 1).lines)
    assert "none: the reference solutions are trained, and no server starts" in lines and "SGLang" not in lines


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rollout.rollouts_per_prompt", "2"], "rollout.rollouts_per_prompt must be 1, and is 2"),
        (["--debug", "rollout-only"], "nothing to sample"),
    ],
)
def test_a_run_that_would_sample_is_refused(words, reason, tmp_path):
    with pytest.raises(BadArgument, match=reason):
        prepare(configure(tmp_path, {"solution": "2+3=5"}, words=words))


def test_rows_without_a_solution_or_with_one_too_long_are_refused_or_left_out(tmp_path):
    rows = [{"solution": "2+3=5"}, {}, {"solution": "2+3=5;" * 30}]
    with pytest.raises(BadArgument, match="problem 2 has no solution"):
        prepare(configure(tmp_path, *rows))
    with pytest.raises(BadArgument, match=r"the solution of problem 2 has \d+ tokens, more than .* = 64"):
        prepare(configure(tmp_path, rows[0], rows[2]))
    train, _, _ = prepare(configure(tmp_path, *rows, words=["--data.bad_rows", "skip"]))
    assert [p.problem.solution for p in train] == ["2+3=5"]


def test_the_loss_is_on_the_solution_and_the_end_of_its_turn(tmp_path):
    config, tokenizer = configure(tmp_path, {"solution": "s"}), AutoTokenizer.from_pretrained(TOKENIZER)
    builder = PromptBuilder(tokenizer, config.data, 64, 512)
    problem = Problem("p", "2+3=?", "5", "2+3=5")
    rollout = Solutions(builder, config).rollout(builder.build(problem, privileged=False), 3, 7)
    assert tokenizer.decode(rollout.response_ids) == "2+3=5<|im_end|>"
    assert (rollout.group, rollout.weight_version, rollout.reward, rollout.finish_reason) == (3, 7, 1.0, "stop")
