"""The prompts of the student and of the privileged teacher: one question, one assistant header, two contexts.

Student and teacher score the same response ids, appended to either prompt. Both see the same text only if both prompts
end in the same tokens (assistant header, thinking tags). This is checked for every prompt.
"""

import re
from typing import Any

from transformers import AutoTokenizer

from megatron_egrsd.config import Config, DataConfig
from megatron_egrsd.config.model import Turns
from megatron_egrsd.data.contexts import fill, load_context
from megatron_egrsd.data.problems import BadRow
from megatron_egrsd.data.samples import Problem, Prompt
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture

UNUSED_TOKENS = 2  # SGLang ends a sequence so many tokens before the model's context, or its KV cache, is full


class PromptBuilder:
    """Builder of prompts from problems by the tokenizer's chat template.

    A response may add `max_response_tokens` tokens; the model's longest sequence has `context_length`.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, max_response_tokens: int, context_length: int):
        if not getattr(tokenizer, "chat_template", None):
            raise BadArgument(
                "the tokenizer of model.path has no chat template; "
                "add chat_template.jinja or the field chat_template of tokenizer_config.json"
            )
        if max_response_tokens >= context_length:
            raise BadArgument(
                f"rollout.max_response_tokens = {max_response_tokens} leaves no room for a prompt in "
                f"the model's context of {context_length} tokens; set a smaller one"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.context = load_context(config)
        self.max_response_tokens = max_response_tokens
        self.context_length = context_length
        # Assistant header and, with thinking off, an empty thinking block.
        self.generation_ids = self._encode(generation_prompt(tokenizer, config))
        self.opened = opened_thinking(tokenizer, config)
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special = re.compile("|".join(map(re.escape, {*added, *tokenizer.all_special_tokens})) or r"(?!)")
        for probe in (Problem("probe", "1 + 1?", "2", "1 + 1 = 2"), Problem("probe", "Hm", "x", "so {x}")):
            self._check_suffix(self._student(probe), self._teacher(probe))

    def build(self, problem: Problem, *, privileged: bool = True) -> Prompt:
        """Build the prompts of `problem`. Without `privileged` no teacher will read it, and `teacher_ids` is empty.

        Raises BadRow if the prompt is empty or too long, or holds a special token, which could forge a turn. Raises
        BadArgument if student's and teacher's prompt do not end in the template's generation prompt.
        """
        if not problem.problem.strip():
            raise BadRow("empty", f"problem {problem.id}", f"problem {problem.id} is empty")
        self._check_special(problem)
        student = self._student(problem)
        teacher = self._teacher(problem) if privileged else []
        self._check_length(problem.id, "student", student)
        self._check_length(problem.id, "teacher", teacher)
        self._check_suffix(student, teacher or student)
        return Prompt(problem, student, teacher)

    def teacher_ids(self, problem: Problem, turns: Turns) -> list[int]:
        """Return the teacher's prompt of `turns`, made of the texts of `problem`. Raises BadRow as `build` does."""
        self._check_special(problem)
        ids = self._encode(self._render(turns))
        self._check_length(problem.id, "teacher", ids)
        self._check_suffix(ids, ids)
        return ids

    def response_ids(self, problem: Problem, text: str) -> list[int]:
        """Return what the chat template writes behind the student's prompt if the assistant says `text`.

        Raises BadArgument if that does not begin with the prompt: the model would be trained on another one.
        """
        turns = fill(self.config.student_template, problem)
        prompt = self._render(turns)
        whole = self._render([*turns, {"role": "assistant", "content": text}], generation_prompt=False)
        if not whole.startswith(prompt):
            raise BadArgument(
                f"the chat template writes another prompt before what the assistant says ({whole[-80:]!r}) than before "
                f"a response ({prompt[-80:]!r}), so reference solutions cannot be trained; change data.enable_thinking"
            )
        return self._encode(whole[len(prompt) :])

    def _check_special(self, problem: Problem) -> None:
        if found := next(filter(None, map(self.special.search, problem.texts[1:])), None):
            place = f"problem {problem.id}"
            reason = f"contains {found[0]!r}, which the tokenizer reads as the end or the begin of a turn, not as text"
            raise BadRow("with special tokens", place, f"{place} {reason}; remove it, or set data.bad_rows skip")

    def _student(self, problem: Problem) -> list[int]:
        return self._encode(self._render(fill(self.config.student_template, problem)))

    def _teacher(self, problem: Problem) -> list[int]:
        return self._encode(self._render(self.context(problem, fill(self.config.student_template, problem))))

    def _render(self, turns: Turns, *, generation_prompt: bool = True) -> str:
        messages = list(turns)
        if self.config.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.config.system_prompt})
        return apply_template(self.tokenizer, self.config, messages, generation_prompt=generation_prompt)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template contains them

    def _check_suffix(self, student: list[int], teacher: list[int]) -> None:
        n = len(self.generation_ids)
        if not student[-n:] == teacher[-n:] == self.generation_ids:
            decode = self.tokenizer.decode
            raise BadArgument(
                "student and teacher prompt do not end in the same generation prompt: "
                f"{decode(student[-n:])!r} and {decode(teacher[-n:])!r}, but the chat template adds "
                f"{decode(self.generation_ids)!r}"
            )

    def _check_length(self, problem_id: str, reader: str, ids: list[int]) -> None:
        limit, most, room = self.config.max_prompt_tokens, self.max_response_tokens, self.context_length - UNUSED_TOKENS
        if len(ids) > limit:
            excess = f"more than data.max_prompt_tokens = {limit}; raise that"
        elif len(ids) + most > room:
            excess = (f"which with rollout.max_response_tokens = {most} exceed the {room} tokens that SGLang samples "
                      "in the model's context; shorten the responses")  # fmt: skip
        else:
            return
        raise BadRow(
            "over-long",
            f"problem {problem_id}",
            f"the {reader} prompt of problem {problem_id} has {len(ids)} tokens, {excess}, remove the problem, or set "
            "data.bad_rows skip",
        )


def generation_prompt(tokenizer: Any, config: DataConfig) -> str:
    """Return what the chat template adds after the user's turn. Raises BadArgument if it adds nothing."""
    turns = [{"role": "user", "content": "1 + 1?"}]
    closed, opened = (apply_template(tokenizer, config, turns, generation_prompt=add) for add in (False, True))
    if len(opened) <= len(closed) or not opened.startswith(closed):
        raise BadArgument(
            "the tokenizer's chat template adds no generation prompt after the user's turn; "
            "without one, student and teacher cannot be aligned"
        )
    return opened[len(closed) :]


def opened_thinking(tokenizer: Any, config: DataConfig) -> str:
    """Return "<think>" if the generation prompt opens the thinking and leaves it open to the response, else "".

    Qwen3-*-Thinking-2507 and other models that always think have such templates: their responses hold no <think>.
    """
    _, tag, after = generation_prompt(tokenizer, config).rpartition("<think>")
    return "" if "</think>" in after else tag


def apply_template(tokenizer: Any, config: DataConfig, turns: Turns, *, generation_prompt: bool) -> str:
    """Return the text of a conversation. Raises BadArgument if the chat template fails on it."""
    try:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            enable_thinking=config.enable_thinking,
        )
    except Exception as error:  # a template is a program: it can raise any exception
        raise BadArgument(f"the tokenizer's chat template fails on a user turn: {error}") from None


def prompt_builder(config: Config, model: str = "") -> PromptBuilder:
    """Make the prompt builder of `model` (default: model.path), with its tokenizer. BadArgument if they do not fit."""
    path = model or config.model.path
    context_length = Architecture.from_pretrained(path).max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(path)
    return PromptBuilder(tokenizer, config.data, config.rollout.max_response_tokens, context_length)
