"""Warnings in plain words if the metrics of a step say that something is wrong, and what to look at."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_egrsd.config import Config

_FIRST = 3  # steps whose mean later steps are compared with
_AGAIN = 50  # steps after which a warning that still holds is repeated

Metrics = dict[str, float]


@dataclass(frozen=True)
class Rule:
    """A warning: `holds(metrics, mean of the first steps, configuration)`, and its sentence with {keys} of metrics.

    The mean is empty during the first steps.
    """

    name: str
    holds: Callable[[Metrics, Metrics, Config], bool]
    sentence: str


def _value(metrics: Metrics, key: str, missing: float = 0.0) -> float:
    value = metrics.get(key)
    return missing if value is None else value


RULES = [
    Rule(
        "cut off",
        lambda m, first, c: _value(m, "response/truncated") > 0.5,
        "{response/truncated:.0%} of the responses are cut off and rewarded with 0: raise rollout.max_response_tokens, "
        "or see whether the model ends its turns (rollout.stop_tokens; megatron-egrsd doctor MODEL DATA)",
    ),
    Rule(
        "no signal",
        lambda m, first, c: _value(m, "batch/degenerate_share") == 1 and not _value(m, "optimizer/updates"),
        "no rollout of the batch has an advantage, so nothing is trained: the problems are all too easy or too hard, "
        "or the reward reads no answer; look at the responses (dump_rollouts), or set rollout.dynamic_sampling",
    ),
    Rule(
        "entropy",
        lambda m, first, c: _value(m, "student/entropy", 1.0) < 0.1 * _value(first, "student/entropy"),
        "the student's entropy has fallen to {student/entropy:.3g} nats, less than a tenth of the first steps': it "
        "samples almost the same response every time; lower optimizer.lr, or raise rollout.temperature",
    ),
    Rule(
        "entropy grows",
        lambda m, first, c: _value(m, "student/entropy") > max(0.2, 3 * _value(first, "student/entropy", float("inf"))),
        "the student's entropy has risen to {student/entropy:.3g} nats, three times that of the first steps: it "
        "unlearns, and soon no response is right; lower optimizer.lr",
    ),
    Rule(
        "gate",
        lambda m, first, c: c.objective.attenuation > 0 and _value(m, "gate/closed_share") > 0.95,
        "the gate is closed at {gate/closed_share:.0%} of the tokens: the teacher is uncertain everywhere; see whether "
        "it reads the solution (data.teacher_template), or raise objective.entropy_floor",
    ),
    Rule(
        "drift",
        lambda m, first, c: (
            _value(m, "sync/log_prob_difference")
            > max(0.02, 0.5 * min(c.log_prob_limit, 1.0), 5 * _value(first, "sync/log_prob_difference"))
        ),
        "the log-probs of SGLang and of the engine drift apart, {sync/log_prob_difference:.2g} nats on average: "
        "rollout.sync.verify true names a weight that differs; updates are skipped from max_log_prob_difference on",
    ),
    Rule(
        "clip",
        lambda m, first, c: c.objective.mix > 0 and _value(m, "weight/clip_share") > 0.9,
        "the likelihood ratio is clipped at {weight/clip_share:.0%} of the tokens: teacher and student agree nowhere; "
        "see whether the teacher's prompt ends like the student's (megatron-egrsd doctor MODEL DATA)",
    ),
    Rule(
        "length",
        lambda m, first, c: _value(m, "response/length") > 3 * _value(first, "response/length", float("inf")),
        "the responses have {response/length:.0f} tokens on average, three times those of the first steps: look at "
        "them (dump_rollouts), raise objective.length_bonus, or lower optimizer.lr",
    ),
    Rule(
        "learning rate",
        lambda m, first, c: m.get("optimizer/lr") == 0,
        "the learning rate is 0, so nothing is trained: see optimizer.schedule, optimizer.min_lr and steps",
    ),
]


class Health:
    """The warnings of a run, each given when it begins to hold, and again after 50 steps if it still does."""

    def __init__(self, config: Config):
        self.config = config
        self.seen: list[Metrics] = []  # of the first steps
        self.given: dict[str, int] = {}  # by name of the rule: the step of its last warning

    def holding(self, metrics: Metrics) -> dict[str, str]:
        """Return the sentences that hold after a step, by rule. Takes the metrics of every step, in order."""
        first: Metrics = {}
        if len(self.seen) < _FIRST:
            self.seen.append(dict(metrics))
        else:
            first = {key: sum(_value(m, key) for m in self.seen) / _FIRST for key in self.seen[0]}
        return {rule.name: rule.sentence.format(**metrics) for rule in RULES if rule.holds(metrics, first, self.config)}

    def warnings(self, step: int, metrics: Metrics) -> list[str]:
        """Return the lines to print after `step`."""
        holding = self.holding(metrics)
        self.given = {name: last for name, last in self.given.items() if name in holding}
        due = [name for name in holding if step - self.given.get(name, step - _AGAIN) >= _AGAIN]
        self.given |= dict.fromkeys(due, step)
        return [f"warning: {holding[name]}" for name in due]
