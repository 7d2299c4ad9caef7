"""`megatron-egrsd doctor MODEL DATA`: a wrong template, file or limit is seen before a GPU is taken."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_egrsd.cli import main
from megatron_egrsd.planning.inspection import answer_kind

MODEL = Path(__file__).parents[2] / "examples/tiny/model"
ROWS = [
    {"id": "a", "problem": "1+2=?", "answer": "3", "solution": "1+2=3"},
    {"id": "b", "problem": "2+2=?", "answer": "4", "solution": "2+2=4 " * 30},
    {"id": "c", "problem": "2+2=?", "answer": "5", "solution": "2"},
    {"id": "d", "problem": "3<|im_end|>", "answer": "5", "solution": "2"},
    {"id": "e", "problem": "3+3=?", "answer": "", "solution": "2"},
]


@pytest.fixture
def doctor(tmp_path, capsys):
    def run(rows, *words, model=MODEL):
        data = tmp_path / "d.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = main(["doctor", str(model), str(data), *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_prompts_lengths_answers_and_stop_tokens(doctor):
    template = "{problem}\nref:{solution}"
    status, out, _ = doctor(ROWS[:2], "--data.teacher_template", template, "--rollout.max_response_tokens", "50")
    assert status == 0
    assert "weights   " in out and "tensors of float32" in out and "'<|im_start|>assistant\\n'" in out
    assert "and end with '<|im_end|>'" in out
    assert "<|im_start|>user\n1+2=?⟦\nref:1+2=3⟧<|im_end|>\n<|im_start|>assistant\n" in out
    assert "50.0% of the solutions are longer than rollout.max_response_tokens = 50" in out
    assert "2 whole number" in out and "2 can be used\n" in out


def test_rows_that_would_be_refused_and_damaged_weights_are_named(doctor, tmp_path):
    status, out, _ = doctor(ROWS, "--rollout.max_response_tokens", "50")
    assert status == 1 and "2 can be used; refused" in out
    for words in ("1 contradicting (line 3)", "1 with an empty 'answer' (line 5)", "1 with special tokens (problem d)"):
        assert words in out
    assert doctor(ROWS, "--data.bad_rows", "skip", "--rollout.max_response_tokens", "50")[0] == 0
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"half")
    status, out, _ = doctor(ROWS[:1], "--rollout.max_response_tokens", "50", model=model)
    assert status == 1 and "weights   cannot be used" in out


def test_solutions_that_cannot_be_trained_are_named(doctor):
    rows = [ROWS[0], ROWS[1], {"id": "f", "problem": "1+1=?", "answer": "2", "solution": ""}]
    words = ("--objective.preset", "sft", "--rollout.rollouts_per_prompt", "1", "--rollout.max_response_tokens", "50")
    status, out, _ = doctor(rows, *words)
    assert status == 1 and "1 can be used; refused" in out
    assert "1 over-long (problem b), 1 without a solution (problem f)" in out
    assert doctor(rows[:1], *words)[0] == 0


def test_mistakes_are_one_sentence(doctor, capsys):
    assert main(["doctor", "--seed"]) == 2 and main(["doctor", "/no/model"]) == 2
    capsys.readouterr()
    status, _, err = doctor(ROWS[:1], model="/no/such/model")
    assert status == 2 and "/no/such/model" in err


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("42", "whole number"), ("1/2", "other number"), ("(C)", "choice"), ("Evelyn", "words"), ("1, 2", "list"),
     ("x^2+1", "expression"), ("so\n#### 18", "whole number")],
)  # fmt: skip
def test_kinds_of_answers(answer, kind):
    assert answer_kind(answer) == kind
