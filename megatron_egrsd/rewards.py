"""Verifiable rewards: a response and the right answer in, a number in [0, 1] out."""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_egrsd.answers import final_answer, gold_answer
from megatron_egrsd.equality import equal
from megatron_egrsd.errors import BadArgument, RunError

if TYPE_CHECKING:
    from megatron_egrsd.samples import Rollout

Reward = Callable[[str, str], float]
log = logging.getLogger(__name__)


def math_reward(response: str, answer: str) -> float:
    """1.0 where the response's final answer equals `answer`, else 0.0.

    Args:
        response: The whole response. Thinking does not count, and thinking that never ends scores 0 (answers.py).
        answer: The plain answer, a boxed one, or a GSM8K solution that ends in "#### 18".

    No string makes it raise or take longer than a few seconds; RunError only where math-verify itself is missing.
    """
    gold = gold_answer(answer)
    return float(any(equal(gold, reading) for reading in final_answer(response)))


def load_reward(name: str) -> Reward:
    """The reward called "math", or the function at the import path "module:function". BadArgument if there is none."""
    if name == "math":
        if importlib.util.find_spec("math_verify") is None:
            raise BadArgument('data.reward is "math", which needs math-verify: pip install math-verify')
        return math_reward
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise BadArgument(f'data.reward is {name!r}; it must be "math" or an import path "module:function"')
    try:
        reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise BadArgument(f"data.reward {name!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(reward):
        raise BadArgument(f"data.reward {name!r} is not a function but a {type(reward).__name__}")
    return reward


def score(rollouts: list["Rollout"], reward: Reward) -> list[float]:
    """The reward of every rollout, as `grade` gives it; one warning a batch says how many rewards failed."""
    grades = [grade(r.text, r.prompt.problem.answer, r.finish_reason, reward) for r in rollouts]
    failures = [(r.prompt.problem.id, error) for r, (_, error) in zip(rollouts, grades, strict=True) if error]
    if failures:
        problem, error = failures[0]
        log.warning(
            "the reward failed on %d of %d responses, which count as 0; first on problem %s: %s",
            len(failures),
            len(rollouts),
            problem,
            error,
        )
    return [value for value, _ in grades]


def grade(response: str, answer: str, finish_reason: str, reward: Reward) -> tuple[float, str]:
    """The reward of a response and, where it failed, why. A truncated response scores 0 unread.

    A reward that raises, or gives something outside [0, 1], counts as 0. RunError is no property of a response and
    passes through.
    """
    if finish_reason == "length":
        return 0.0, ""
    try:
        value = float(reward(response, answer))
    except RunError:
        raise
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"
    if not 0 <= value <= 1:  # nor is nan
        return 0.0, f"it returned {value}, outside [0, 1]"
    return value, ""
