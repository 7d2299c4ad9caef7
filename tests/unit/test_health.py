"""Warnings of a run: each failure of training has one, a healthy run has none, and none is repeated at every step."""

import dataclasses

import pytest

from megatron_egrsd.config import Config, DataConfig, ModelConfig
from megatron_egrsd.run.health import RULES, Health

CONFIG = Config(ModelConfig("m"), DataConfig(train="d"))
HEALTHY = {
    "response/truncated": 0.1, "batch/degenerate_share": 0.2, "student/entropy": 0.5, "gate/closed_share": 0.2,
    "sync/log_prob_difference": 1e-3, "weight/clip_share": 0.3, "response/length": 400.0, "optimizer/lr": 1e-6,
}  # fmt: skip
ILL = {
    "cut off": ({"response/truncated": 0.88}, "88% of the responses are cut off"),
    "no signal": ({"batch/degenerate_share": 1.0}, "no rollout of the batch has an advantage"),
    "entropy": ({"student/entropy": 0.01}, "fallen to 0.01 nats"),
    "entropy grows": ({"student/entropy": 1.6}, "risen to 1.6 nats, three times"),
    "gate": ({"gate/closed_share": 0.99}, "the gate is closed at 99%"),
    "drift": ({"sync/log_prob_difference": 0.06}, "drift apart, 0.06 nats"),
    "clip": ({"weight/clip_share": 0.95}, "clipped at 95%"),
    "length": ({"response/length": 1500.0}, "1500 tokens on average, three times"),
    "learning rate": ({"optimizer/lr": 0.0}, "the learning rate is 0"),
}


def test_a_healthy_run_has_no_warning_and_every_rule_a_test():
    health = Health(CONFIG)
    assert not [w for step in range(1, 20) for w in health.warnings(step, HEALTHY)]
    assert [rule.name for rule in RULES] == list(ILL)


@pytest.mark.parametrize("name", ILL)
def test_what_goes_wrong_is_said_once_and_again_after_many_steps(name):
    change, words = ILL[name]
    health = Health(CONFIG)
    for step in range(1, 6):
        health.warnings(step, HEALTHY)
    (warning,) = health.warnings(6, HEALTHY | change)
    assert warning.startswith("warning: ") and words in warning
    later = {step: health.warnings(step, HEALTHY | change) for step in range(7, 120)}
    assert [step for step, given in later.items() if given] == [56, 106]
    assert health.warnings(120, HEALTHY) == []
    assert len(health.warnings(121, HEALTHY | change)) == 1  # it has begun anew


# Rule -> (metric, the last value that is no reason to warn, the next one).
THRESHOLDS = {
    "cut off": ("response/truncated", 0.5, 0.51),
    "no signal": ("batch/degenerate_share", 0.99, 1.0),
    "entropy": ("student/entropy", 0.0501, 0.0499),
    "entropy grows": ("student/entropy", 1.5, 1.51),
    "gate": ("gate/closed_share", 0.95, 0.951),
    "drift": ("sync/log_prob_difference", 0.05, 0.051),  # half of the limit, 0.1 nats
    "clip": ("weight/clip_share", 0.9, 0.91),
    "length": ("response/length", 1200.0, 1201.0),
    "learning rate": ("optimizer/lr", 1e-12, 0.0),
}


def _after_three_steps(config: Config, first: dict, metrics: dict) -> int:
    """Return the number of warnings of `metrics`, at the step after three steps of `first`."""
    health = Health(config)
    for step in (1, 2, 3):
        health.warnings(step, HEALTHY | first)
    return len(health.warnings(4, HEALTHY | first | metrics))


@pytest.mark.parametrize("name", ILL)
def test_each_rule_has_its_threshold(name):
    key, silent, warns = THRESHOLDS[name]
    assert [_after_three_steps(CONFIG, {}, {key: value}) for value in (silent, warns)] == [0, 1]


@pytest.mark.parametrize(
    ("limit", "first", "silent", "warns"),
    [(0.1, 0.02, 0.09, 0.11), (0.01, 0.0, 0.02, 0.021), (1.0, 0.0, 0.5, 0.51), (9.0, 0.0, 0.5, 0.51)],
)
def test_drift_is_five_times_that_of_the_first_steps_or_half_the_limit_or_a_fiftieth(limit, first, silent, warns):
    config = dataclasses.replace(CONFIG, max_log_prob_difference=limit)
    key = "sync/log_prob_difference"
    assert [_after_three_steps(config, {key: first}, {key: value}) for value in (silent, warns)] == [0, 1]


def test_a_little_entropy_may_grow():
    """That of a model that is sure of nearly every token, to three times as much."""
    assert [_after_three_steps(CONFIG, {"student/entropy": 0.01}, {"student/entropy": value})
            for value in (0.2, 0.21)] == [0, 1]  # fmt: skip


def test_an_update_without_advantages_is_one():
    """As of an objective that trains all rollouts, or with a KL penalty."""
    trained = HEALTHY | {"batch/degenerate_share": 1.0, "optimizer/updates": 1.0}
    assert not Health(CONFIG).warnings(1, trained)
    assert "has an advantage" in Health(CONFIG).warnings(1, trained | {"optimizer/updates": 0.0})[0]


def test_the_first_step_may_warn_and_missing_metrics_do_not():
    assert "cut off" in Health(CONFIG).warnings(1, HEALTHY | {"response/truncated": 0.9})[0]
    health = Health(CONFIG)
    assert not [w for step in range(1, 6) for w in health.warnings(step, {"response/length": 5.0})]


def test_rules_follow_the_configuration():
    """Without a gate no gate is closed, and a limit of the user's decides when log-probs drift."""
    open_gate = dataclasses.replace(CONFIG, objective=dataclasses.replace(CONFIG.objective, attenuation=0.0))
    assert not Health(open_gate).warnings(1, HEALTHY | {"gate/closed_share": 1.0})
    loose = dataclasses.replace(CONFIG, max_log_prob_difference=1.0)
    assert not Health(loose).warnings(1, HEALTHY | {"sync/log_prob_difference": 0.06})
