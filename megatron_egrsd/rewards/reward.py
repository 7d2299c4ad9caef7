"""Verifiable rewards: functions of a response and the right answer with values in [0, 1]."""

import atexit
import importlib.util
import itertools
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pebble

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rewards.answers import THINKING, final_answer, gold_answer
from megatron_egrsd.rewards.equality import equal
from megatron_egrsd.system import import_path

if TYPE_CHECKING:
    from megatron_egrsd.data.samples import Rollout

Reward = Callable[[str, str], float]
log = logging.getLogger(__name__)
WORKERS = min(8, os.cpu_count() or 1)  # responses rewarded at once; processes of a user's reward function


def math_reward(response: str, answer: str) -> float:
    """Return 1.0 if the response's final answer equals `answer`, else 0.0.

    `response` stands behind the <think> that its prompt may have opened. Thinking does not count, and thinking that
    never ends scores 0 (answers.py). `answer` is plain, boxed, or a GSM8K solution that ends in "#### 18". Takes a few
    seconds at most, and raises for no string. Raises RunError if math-verify is missing.
    """
    gold = gold_answer(answer)
    return float(any(equal(gold, reading) for reading in final_answer(response)))


def load_reward(name: str, timeout: float = 30.0) -> Reward:
    """Load the reward "math", or the function at an import path (import_path.py). Raises BadArgument if there is none.

    A user's function runs in worker processes. A call that takes longer than `timeout` seconds raises TimeoutError; a
    call that ends its process raises too. Neither ends the run.
    """
    if name == "math":
        check_math_verify('data.reward is "math"')
        return math_reward
    _import(name)
    return _WorkerReward(name, timeout)


def check_math_verify(reason: str) -> None:
    """Raise BadArgument if answers cannot be compared; `reason` says why they would be."""
    if importlib.util.find_spec("math_verify") is None:
        raise BadArgument(f"{reason}, which needs math-verify: pip install math-verify")


def _import(name: str) -> Reward:
    reward = import_path.load(name, "data.reward")
    if not callable(reward):
        raise BadArgument(f"data.reward {name!r} is not a function but a {type(reward).__name__}")
    return reward


class _WorkerReward:
    """A user's reward function, called in worker processes. Any thread may call it."""

    def __init__(self, name: str, timeout: float):
        self.name, self.timeout = name, timeout
        self.pool: pebble.ProcessPool | None = None
        self.lock = threading.Lock()

    def __call__(self, response: str, answer: str) -> float:
        with self.lock:
            if self.pool is None:  # spawned: a fork would copy the trainer's threads' locks
                spawn = multiprocessing.get_context("spawn")
                self.pool = pebble.ProcessPool(WORKERS, context=spawn, initializer=_prepare, initargs=[self.name])
                atexit.register(self.pool.stop)
        try:
            return self.pool.schedule(_call, [response, answer], timeout=self.timeout).result()
        except TimeoutError:
            raise TimeoutError(f"longer than data.reward_timeout = {self.timeout:g} s") from None


_user_reward: Callable[[str, str], float]  # of a worker


def _prepare(name: str) -> None:
    """Load the user's function in a worker, at its start."""
    global _user_reward
    _user_reward = _import(name)


def _call(response: str, answer: str) -> float:
    return float(_user_reward(response, answer))


def warn_of_failures(rollouts: list["Rollout"]) -> None:
    """Log one warning for all rewards of a batch that failed."""
    failed = [r for r in rollouts if r.reward_error]
    if failed:
        log.warning(
            "the reward failed on %d of %d responses, which count as 0; first on problem %s: %s",
            len(failed),
            len(rollouts),
            failed[0].prompt.problem.id,
            failed[0].reward_error,
        )


def decode_and_grade(
    tokenizer, response_ids: list[int], answer: str, finish_reason: str, reward: Reward, opened: str = ""
) -> tuple[str, float, str]:
    """Return the text of a response without special tokens, and its (reward, failure) by `grade`.

    `opened` is the thinking tag that the prompt has opened, or "": the reward reads it before the text.
    """
    text = _decode(tokenizer, response_ids)
    return text, *grade(opened + text, answer, finish_reason, reward)


def _decode(tokenizer, ids: list[int]) -> str:
    """Return the text of `ids` without special tokens; the tags of thinking stay even if the tokenizer says special."""
    tags = [token for token in tokenizer.all_special_tokens if token in THINKING]
    if not tags:
        return tokenizer.decode(ids, skip_special_tokens=True)
    names = dict(zip(tokenizer.convert_tokens_to_ids(tags), tags, strict=True))
    parts = itertools.groupby(ids, key=names.get)
    return "".join(tag * len(list(run)) if tag else tokenizer.decode(list(run), skip_special_tokens=True)
                   for tag, run in parts)  # fmt: skip


def grade(response: str, answer: str, finish_reason: str, reward: Reward) -> tuple[float, str]:
    """Return (reward, reason of a failure or ""). A truncated response scores 0 without a call of `reward`.

    A reward that raises or is outside [0, 1] counts as 0. RunError passes through: it is no property of a response.
    """
    if finish_reason == "length":
        return 0.0, ""
    try:
        value = float(reward(response, answer))
    except RunError:
        raise
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"
    if not 0 <= value <= 1:  # true for nan too
        return 0.0, f"it returned {value}, outside [0, 1]"
    return value, ""
