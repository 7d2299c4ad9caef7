"""Sampling and rewards at the same time, with responses from a list instead of a server."""

import logging
import threading

import pytest

from megatron_egrsd.config import RolloutConfig
from megatron_egrsd.data.samples import Problem, Prompt
from megatron_egrsd.rewards.reward import math_reward
from megatron_egrsd.rollout.generation import Generation
from megatron_egrsd.rollout.servers import ServersLost
from megatron_egrsd.sampling.sampler import Sampler

PROMPTS = [Prompt(Problem(f"p{i}", "?", str(i)), [10 + i], [20 + i]) for i in range(3)]


class Tokenizer:
    all_special_tokens = ()

    def decode(self, ids, skip_special_tokens):
        return str(ids[0])


class Responses:
    """A stand-in for RolloutClient: the j-th response to the i-th prompt is the token 10 i + j, the last one first."""

    def __init__(self, meanwhile=lambda key: None):
        self.meanwhile = meanwhile  # called before each response
        self.settings = None  # of the last call

    def generate(self, prompts, n, *, settings, done, finished, routes):
        assert not routes
        self.settings = settings
        done = {} if done is None else done
        for i, j in reversed([(i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in done]):
            self.meanwhile((i, j))
            done[i, j] = Generation([10 * i + j], [-0.5], "stop", [[4, 1]])
            finished(i, j, done[i, j])
        return [[done[i, j] for j in range(n)] for i in range(len(prompts))]


def test_a_response_is_rewarded_while_others_are_sampled():
    """The last response comes only after the first has its reward; otherwise the test would wait for ever."""
    rewarded = threading.Event()

    def reward(text, answer):
        rewarded.set()
        return float(text == f"{answer}1")

    def meanwhile(key):
        assert key != (0, 0) or rewarded.wait(20), "no response was rewarded before all were there"

    responses, settings = Responses(meanwhile), RolloutConfig(temperature=0.8)
    rollouts = Sampler(responses, Tokenizer(), reward).sample(PROMPTS, 2, settings)
    assert responses.settings is settings
    assert [(r.group, r.response_ids) for r in rollouts] == [(i, [10 * i + j]) for i in range(3) for j in range(2)]
    assert [r.reward for r in rollouts] == [0.0, 0.0, 0.0, 1.0, 0.0, 1.0]  # "01" is not "1"
    assert all(r.prompt is PROMPTS[r.group] and r.weight_version == 4 for r in rollouts)


def test_what_was_sampled_before_the_servers_were_lost_is_rewarded_too():
    def lost(key):
        if key == (1, 0):
            raise ServersLost("gone")

    done = {}
    with pytest.raises(ServersLost):
        Sampler(Responses(lost), Tokenizer(), lambda *_: 1.0).sample(PROMPTS, 2, RolloutConfig(), done)
    assert sorted(done) == [(1, 1), (2, 0), (2, 1)]

    def again(key):
        assert key in [(0, 0), (0, 1), (1, 0)]

    rollouts = Sampler(Responses(again), Tokenizer(), lambda *_: 1.0).sample(PROMPTS, 2, RolloutConfig(), done)
    assert [(r.group, r.reward) for r in rollouts] == [(i, 1.0) for i in range(3) for _ in range(2)]


def test_rewards_that_nobody_waits_for_are_not_begun():
    """The run ends while one reward is computed for each thread and others wait."""
    free, begun = threading.Event(), []

    def reward(text, answer):
        begun.append(text)
        return float(free.wait(20))

    def ends(key):
        if key == (0, 0):
            raise ServersLost("gone")

    sampler = Sampler(Responses(ends), Tokenizer(), reward)
    with pytest.raises(ServersLost):
        sampler.sample(PROMPTS, 30, RolloutConfig())
    free.set()
    sampler.threads.shutdown()
    assert len(begun) < 30


def test_one_warning_says_how_many_rewards_failed(caplog):
    def reward(text, answer):
        raise KeyError("x")

    with caplog.at_level(logging.WARNING):
        rollouts = Sampler(Responses(), Tokenizer(), reward).rewarded(
            PROMPTS[0], [Generation([1], [-0.5], reason, [[0, 1]]) for reason in ("stop", "length", "stop")]
        )
    assert [(r.reward, bool(r.reward_error)) for r in rollouts] == [(0.0, True), (0.0, False), (0.0, True)]
    assert len(caplog.records) == 1 and "2 of 3 responses" in caplog.text and "problem p0: KeyError" in caplog.text


@pytest.mark.parametrize(
    ("response", "opened", "right"),
    [
        (r"So 2 + 2 = \boxed{4}. Wait, let me check this again.", "<think>", 0),
        (r"So 2 + 2 = \boxed{5}. Wait.</think> It is \boxed{4}.", "<think>", 1),
        (r"So 2 + 2 = \boxed{4}.", "", 1),
        (r"</think> It is \boxed{4}. <think> Or is it? \boxed{4}", "<think>", 0),
    ],
)
def test_thinking_that_the_prompt_has_opened_and_nothing_ends_is_no_answer(response, opened, right):
    """Qwen3-*-Thinking-2507: the generation prompt ends in <think>, so that no response holds one."""

    class Says(Tokenizer):
        def decode(self, ids, skip_special_tokens):
            return response

    prompt = Prompt(Problem("p", "2 + 2?", "4"), [1], [2])
    sampler = Sampler(Responses(), Says(), math_reward, opened)
    (rollout,) = sampler.sample([prompt], 1, RolloutConfig())
    assert (rollout.reward, rollout.text) == (right, response)
