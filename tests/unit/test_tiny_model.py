"""The committed tiny model and its task, on which the demo and the other tests rely."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny import make_model as tiny

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model").eval()


def _rows(split):
    return [json.loads(line) for line in (TINY / f"{split}.jsonl").read_text().splitlines()]


def _chain_texts(count):
    rng = random.Random(1)
    for _ in range(count):
        problem = tiny.random_steps(rng)
        yield "".join(tiny.Chain(problem, rng.choice([tiny.STUDENT, tiny.TEACHER]), rng).tokens)


def test_size_and_shape_allow_two_way_parallelism(model):
    config = model.config
    assert config.architectures == ["Qwen3ForCausalLM"] and config.tie_word_embeddings
    assert 300_000 <= model.num_parameters() <= 370_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(file.stat().st_size for file in (TINY / "model").iterdir()) <= 2 * 2**20
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers)
    assert all(count % 2 == 0 for count in counts)
    assert config.max_position_embeddings == 1024


def test_tokenizer_round_trip(tokenizer):
    assert tokenizer.get_vocab() == tiny.TOKEN_ID
    for text in _chain_texts(200):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_pair_of_tokens_round_trips(tokenizer):
    usable = range(len(tiny.VOCABULARY))
    for first in usable:
        for second in usable:
            text = tokenizer.decode([first, second], skip_special_tokens=False)
            assert tokenizer(text)["input_ids"] == [first, second], text


def test_answer_is_plain_text_after_the_thinking(tokenizer):
    ids = tiny.encode(["<think>", "\n", "</think>", "\n", "4", "2", "<|im_end|>"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n</think>\n42"
    assert ids[-1] == tokenizer.eos_token_id


def test_unknown_text_becomes_unk_and_never_nothing(tokenizer):
    ids = tokenizer("The capital city of France is")["input_ids"]
    assert ids and tokenizer.unk_token_id in ids
    assert tokenizer.unk_token == "<unk>"


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_chat_template_gives_student_and_teacher_prompts(tokenizer, options):
    for seed in range(20):
        problem = tiny.random_steps(random.Random(seed))
        text, solution = tiny.problem_text(problem), tiny.solution_text(problem)
        contents = {text: None, tiny.TEACHER_TEMPLATE.format(problem=text, solution=solution): problem}
        for content, reference in contents.items():
            turns = [{"role": "user", "content": content}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **options)
            assert ids == tiny.prompt_ids(problem, reference)


def test_problems_are_what_the_tool_makes_and_splits_are_disjoint():
    expected = tiny.make_problems(random.Random(0))
    for split, problems in zip(("train", "heldout"), expected, strict=True):
        assert [row["problem"] for row in _rows(split)] == [tiny.problem_text(steps) for steps in problems]
    train, heldout = ({row["problem"] for row in _rows(split)} for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (1500, 128)
    assert not train & heldout


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_solutions_are_right_and_end_in_the_answer(split):
    for row in _rows(split):
        assert set(row) == {"id", "problem", "answer", "solution"}
        assert all(isinstance(value, str) for value in row.values())
        expression = row["problem"].removesuffix("=?")
        value = expression[:2]
        for step in row["solution"].split(";"):
            left, result = step.split("=")
            assert left[:2] == value and 10 <= int(result) <= 99 and eval(left) == int(result)
            value = result
        assert value == row["answer"] and eval(expression) == int(value)


@pytest.mark.heavy
def test_teacher_reads_its_reference(model):
    """On noisy chains of the student's style: no sampling, three forward passes."""
    rng = random.Random(2)
    problems = tiny.make_problems(random.Random(0))[1][:96]
    responses = [tiny.encode(tiny.Chain(problem, tiny.STUDENT, rng).tokens) for problem in problems]
    measured = tiny.reading(model, problems, responses)
    assert measured["correlation"] < 0.7
    assert measured["right reference: contradicted tokens"] > 0
    assert (
        measured["right reference: log-ratio, contradicted"] < -1.0 < measured["right reference: log-ratio, elsewhere"]
    )
