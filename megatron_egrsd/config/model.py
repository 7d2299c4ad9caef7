"""The student, and the problems and prompts that it reads."""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_egrsd.config.check import require


@dataclass(frozen=True)
class ModelConfig:
    """The student, which is also its own teacher.

    Args:
        path: Directory of a Hugging Face Qwen3 checkpoint (config.json, tokenizer, safetensors).
        dtype: Type of the weights and activations in training and in SGLang.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        require(bool(self.path), "model.path is not set; give the directory of a Hugging Face Qwen3 checkpoint")


@dataclass(frozen=True)
class DataConfig:
    """Problems and prompts.

    Args:
        train: Training problems: a .jsonl or .parquet file, or a Hugging Face dataset name ("name:split").
        evaluation: Held-out problems in the same format; empty switches evaluation off.
        problem_key: Field that holds the problem text.
        answer_key: Field that holds the verifiable answer.
        solution_key: Field that holds the reference solution, the privileged context.
        teacher_template: What the teacher reads as the user's turn; may use {problem}, {solution} and {answer}.
        system_prompt: Optional system turn, for student and teacher alike.
        enable_thinking: Passed to the chat template (Qwen3's thinking mode).
        max_prompt_tokens: A longer student or teacher prompt is refused, naming the problem.
        reward: "math" or the import path of a function (response: str, answer: str) -> float in [0, 1].
        reward_timeout: Seconds that one call of a reward function of the user's may take.
        bad_rows: Refuse a file with rows that cannot be trained on (not JSON, not UTF-8, empty, without an answer,
            over-long, duplicate), or leave those rows out and say how many and where.
    """

    train: str = ""
    evaluation: str = ""
    problem_key: str = "problem"
    answer_key: str = "answer"
    solution_key: str = "solution"
    teacher_template: str = (
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
        fields = set(re.findall(r"{(\w*)}", self.teacher_template))
        unknown = fields - {"problem", "solution", "answer"}
        require(
            not unknown,
            f"data.teacher_template uses {{{'}, {'.join(sorted(unknown))}}}; "
            "it knows {problem}, {solution} and {answer}",
        )
        require(
            bool(fields & {"solution", "answer"}),
            "data.teacher_template must contain {solution} or {answer}: the teacher needs privileged context",
        )
        require(self.max_prompt_tokens > 0, "data.max_prompt_tokens must be positive")
        require(self.reward_timeout > 0, "data.reward_timeout must be positive")
