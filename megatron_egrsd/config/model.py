"""The student, and the problems and prompts that it reads."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from megatron_egrsd.config.check import require, require_positive
from megatron_egrsd.errors import BadArgument


@dataclass(frozen=True)
class ModelConfig:
    """The student, which is also its own teacher.

    Args:
        path: Directory of a Hugging Face checkpoint of a Qwen3, Qwen2 or Llama (config.json, tokenizer, safetensors).
        dtype: Type of the weights and activations in training and in SGLang.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        require(bool(self.path), "model.path is not set; give the directory of a Hugging Face checkpoint")


Turns = list[dict[str, str]]  # a conversation: {"role": "system" | "user" | "assistant", "content": text} each
_BRACED = re.compile(r"(?<![A-Za-z}])\{(\w+)\}")  # no argument of a LaTeX command: \\text{solutions}
# Contexts of the teacher, by name (data/contexts.py): those that quote a rollout, those that need rollouts, and all.
QUOTING = ("sibling", "contrast")
SIBLINGS = (*QUOTING, "majority")
CONTEXTS = ("template", "answer", "concise", *SIBLINGS)
_PLACEHOLDERS = ("problem", "solution", "answer")


def placeholders(template: str | Turns) -> set[str]:
    """Return which of {problem}, {solution} and {answer} a template contains; other braces are text, as in LaTeX."""
    texts = [template] if isinstance(template, str) else [turn["content"] for turn in template]
    return {name for name in _PLACEHOLDERS for text in texts if f"{{{name}}}" in text}


def check_template(key: str, template: str | Turns) -> None:
    """Raise BadArgument, naming `key`, for a template that is no conversation or has a misspelt placeholder."""
    turns = [{"role": "user", "content": template}] if isinstance(template, str) else template
    for turn in turns:
        require(
            isinstance(turn, dict)
            and set(turn) == {"role", "content"}
            and turn["role"] in ("system", "user", "assistant")
            and isinstance(turn["content"], str),
            f'{key} is a list of turns {{"role": "system", "user" or "assistant", "content": text}}, but holds {turn}',
        )
        for word in _BRACED.findall(turn["content"]):
            if word not in _PLACEHOLDERS and (near := difflib.get_close_matches(word, _PLACEHOLDERS, 1, 0.75)):
                raise BadArgument(f"{key} contains {{{word}}}, which would stay as it is; did you mean {{{near[0]}}}?")
    require(bool(turns) and turns[-1]["role"] == "user", f"{key} must end with a turn of the user, which is answered")


@dataclass(frozen=True)
class DataConfig:
    """Problems and prompts.

    Args:
        train: Training problems: a .jsonl or .parquet file, or a Hugging Face dataset name ("name:split").
        evaluation: Held-out problems in the same format; empty switches evaluation off.
        problem_key: Field that holds the problem text.
        answer_key: Field that holds the verifiable answer. The answer of a row without it is the last box of its
            solution.
        solution_key: Field that holds the reference solution, the privileged context.
        teacher_context: The teacher's prompt. "template": the turns of `teacher_template` or `teacher_key`; "answer":
            the student's turns with the answer behind them; "concise": the student's turns with the wish for a short
            solution before the last (CRISP); "sibling": the template with a right rollout of the same prompt as
            {solution}; "contrast": that, and up to `wrong_siblings` wrong ones, each in a context of its own (RLCSD);
            "majority": the student's turns with the answer that most rollouts of the prompt give behind them.
            Or the import path of a function, "file.py:function" or
            "module:function", that makes the turns of a problem and the student's turns (docs/guides/data.md).
        wrong_siblings: Most wrong rollouts that "contrast" shows to the teacher; each costs a scoring pass.
        teacher_key: Field that holds the teacher's conversation, ready-made: a text (one user turn) or a list of turns
            as in teacher_template. Empty: the template makes it.
        student_template: The user turn that the student reads, in training and evaluation, with {problem} in it; or a
            list of turns {"role": ..., "content": ...} that ends with the user's. Other braces are text.
        teacher_template: The same for the teacher, with {solution} or {answer} in it.
        system_prompt: Optional system turn, for student and teacher alike.
        enable_thinking: Passed to the chat template (Qwen3's thinking mode).
        max_prompt_tokens: A longer student or teacher prompt is refused, naming the problem.
        reward: "math" or the import path of a function (response: str, answer: str) -> float in [0, 1].
        reward_timeout: Seconds that one call of a reward function of the user's may take.
        bad_rows: Refuse a file with rows that cannot be trained on (not JSON, not UTF-8, empty, without an answer,
            over-long, duplicate, with special tokens), or leave those rows out and say how many and where.
    """

    train: str = ""
    evaluation: str = ""
    problem_key: str = "problem"
    answer_key: str = "answer"
    solution_key: str = "solution"
    teacher_context: str = "template"
    wrong_siblings: int = 4
    teacher_key: str = ""
    student_template: str | list[dict[str, str]] = "{problem}"
    teacher_template: str | list[dict[str, str]] = (
        "{problem}\n\nHere is a reference solution to this problem:\n{solution}\n\n"
        "With this solution in mind, solve the problem in your own words."
    )
    system_prompt: str = ""
    enable_thinking: bool = True
    max_prompt_tokens: int = 2048
    reward: str = "math"
    reward_timeout: float = 30.0
    bad_rows: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self):
        check_template("data.student_template", self.student_template)
        check_template("data.teacher_template", self.teacher_template)
        require("problem" in placeholders(self.student_template), "data.student_template must contain {problem}")
        require(
            self.teacher_context in CONTEXTS or ":" in self.teacher_context,
            f"data.teacher_context is {self.teacher_context!r}; it must be {', '.join(CONTEXTS)}, or an import path "
            '"file.py:function"',
        )
        told = bool(self.teacher_key) or bool(placeholders(self.teacher_template) & {"solution", "answer"})
        require(
            told or self.teacher_context != "template",
            "data.teacher_template must contain {solution} or {answer}: the teacher needs privileged context",
        )
        require(
            not placeholders(self.student_template) & {"solution", "answer"},
            "data.student_template contains {solution} or {answer}: the student would read what only the teacher may",
        )
        require(
            self.teacher_context not in QUOTING or "solution" in placeholders(self.teacher_template),
            f'data.teacher_context is "{self.teacher_context}", so data.teacher_template must contain {{solution}}, '
            "the place of the rollout that the teacher reads",
        )
        require_positive(self, "data", "max_prompt_tokens", "reward_timeout", "wrong_siblings")

    @property
    def reads_siblings(self) -> bool:
        """Return whether the teacher's contexts are made of rollouts, and can be built only when these are there."""
        return self.teacher_context in SIBLINGS
