"""Make what the teacher reads: the turns that it answers in place of the student's, chosen by `data.teacher_context`.

A context is a function of a problem and of the turns that the student reads, and returns the teacher's turns. The last
is one of the user. docs/guides/data.md shows one in a file of its own.
"""

import functools
import re
from collections.abc import Callable

from megatron_egrsd.config import DataConfig
from megatron_egrsd.config.model import Turns
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.system import import_path

Context = Callable[[Problem, Turns], Turns]

_CONCISE = "Solve the problem below correctly and briefly: only the steps that lead to the answer, none of them twice."
_ANSWER = "The correct answer is {answer}. Reason until you reach it."
_MAJORITY = "The most frequent answer of several attempts is {answer}. Reason until you reach it."


def load_context(config: DataConfig) -> Context:
    """Return the context that `config` names. Raises BadArgument if there is none."""
    if config.teacher_context in _BUILT_IN:
        return _BUILT_IN[config.teacher_context]
    if config.teacher_context == "template" or config.reads_siblings:  # a sibling stands where the solution does
        return lambda problem, student: problem.teacher_turns or fill(config.teacher_template, problem)
    return functools.partial(_of_user, config.teacher_context, import_path.load(config.teacher_context, _KEY))


def answer(problem: Problem, student: Turns) -> Turns:
    """Return the student's turns, and the answer behind them."""
    return _told(_ANSWER, problem, student)


def majority(problem: Problem, student: Turns) -> Turns:
    """Return the student's turns, and `problem.answer` behind them as most rollouts' answer (sampling/majority.py)."""
    return _told(_MAJORITY, problem, student)


def concise(problem: Problem, student: Turns) -> Turns:
    """Return the student's turns, the last one led by a wish for few words (CRISP, arXiv 2603.05433, appendix B)."""
    return [*student[:-1], student[-1] | {"content": f"{_CONCISE}\n\n{student[-1]['content']}"}]


_KEY = "data.teacher_context"
_BUILT_IN: dict[str, Context] = {"answer": answer, "concise": concise, "majority": majority}


def _told(words: str, problem: Problem, student: Turns) -> Turns:
    """Add `words`, a template, to the student's last turn."""
    told = fill(words, problem)[0]["content"]
    return [*student[:-1], student[-1] | {"content": f"{student[-1]['content']}\n\n{told}"}]


def _of_user(name: str, context: Context, problem: Problem, student: Turns) -> Turns:
    """Call a user's function; BadArgument if it fails, or returns no conversation that ends with the user's turn."""
    try:
        turns = context(problem, [dict(turn) for turn in student])
        if not turns[-1]["role"] == "user" or not all(isinstance(turn["content"], str) for turn in turns):
            raise ValueError(f"it should return turns that end with the user's, and returns {turns!r}")
    except Exception as error:  # a user's function may raise anything
        raise BadArgument(f"{_KEY} {name!r} fails on problem {problem.id}: {type(error).__name__}: {error}") from None
    return turns


def fill(template: str | Turns, problem: Problem) -> Turns:
    """Return the turns of a template with {problem}, {solution} and {answer} replaced, each in one pass.

    Not by str.format: LaTeX is full of braces, and the text "{solution}" within a problem must stay as it is.
    """
    values = {"problem": problem.problem, "solution": problem.solution, "answer": problem.answer}

    def filled(text: str) -> str:
        return re.sub(r"{(problem|solution|answer)}", lambda match: values[match[1]], text)

    turns = [{"role": "user", "content": template}] if isinstance(template, str) else template
    return [turn | {"content": filled(turn["content"])} for turn in turns]
