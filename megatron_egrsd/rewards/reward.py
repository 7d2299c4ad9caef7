"""Verifiable rewards: a response and the right answer in, a number in [0, 1] out."""

import atexit
import importlib.util
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pebble

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rewards.answers import final_answer, gold_answer
from megatron_egrsd.rewards.equality import equal
from megatron_egrsd.system import import_path

if TYPE_CHECKING:
    from megatron_egrsd.data.samples import Rollout

Reward = Callable[[str, str], float]
log = logging.getLogger(__name__)
WORKERS = min(8, os.cpu_count() or 1)  # responses rewarded at once; processes of a user's reward function


def math_reward(response: str, answer: str) -> float:
    """1.0 where the response's final answer equals `answer`, else 0.0.

    Args:
        response: The whole response. Thinking does not count, and thinking that never ends scores 0 (answers.py).
        answer: The plain answer, a boxed one, or a GSM8K solution that ends in "#### 18".

    No string makes it raise or take longer than a few seconds; RunError only where math-verify itself is missing.
    """
    gold = gold_answer(answer)
    return float(any(equal(gold, reading) for reading in final_answer(response)))


def load_reward(name: str, timeout: float = 30.0) -> Reward:
    """The reward called "math", or the function at an import path (import_path.py). BadArgument if there is none.

    A user's function runs in worker processes: a call that takes longer than `timeout` seconds raises TimeoutError, one
    that ends its process raises as well, and neither harms the run.
    """
    if name == "math":
        if importlib.util.find_spec("math_verify") is None:
            raise BadArgument('data.reward is "math", which needs math-verify: pip install math-verify')
        return math_reward
    _import(name)
    return _InWorkers(name, timeout)


def _import(name: str) -> Reward:
    reward = import_path.load(name, "data.reward")
    if not callable(reward):
        raise BadArgument(f"data.reward {name!r} is not a function but a {type(reward).__name__}")
    return reward


class _InWorkers:
    """A user's reward function, called in processes of its own; any thread may call."""

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


def _prepare(name: str) -> None:
    """In a worker, at its start."""
    global _user_reward
    _user_reward = _import(name)


def _call(response: str, answer: str) -> float:
    return float(_user_reward(response, answer))


def warn_of_failures(rollouts: list["Rollout"]) -> None:
    """One warning for all rewards of a batch that could not be had."""
    failed = [r for r in rollouts if r.reward_error]
    if failed:
        log.warning(
            "the reward failed on %d of %d responses, which count as 0; first on problem %s: %s",
            len(failed),
            len(rollouts),
            failed[0].prompt.problem.id,
            failed[0].reward_error,
        )


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
