"""The metrics of a run: keys, columns, formats, meanings.

The columns of the log and docs/reference/metrics.md are made from `METRICS` (`python -m megatron_egrsd.run.metrics`).
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """A key, its column (empty: not on the line), the format of its value, and what it means with its unit."""

    key: str
    label: str
    format: str
    meaning: str


METRICS = [
    Metric("reward/mean", "reward", "6.3f", "Mean reward of the batch's rollouts."),
    Metric("reward/shaped", "", "6.3f", "Mean shaped reward: right responses with the length bonus."),
    Metric("reward/running_mean", "", "6.3f", "Mean shaped reward of all earlier steps."),
    Metric("reward/running_std", "", "6.3f", "The same: sample standard deviation."),
    Metric("reward/failed", "", "5.0f", "Rollouts whose reward function raised or took too long; they count as 0."),
    Metric("accuracy", "acc", "5.3f", "Share of rollouts with reward above 0.5."),
    Metric("response/length", "len", "6.1f", "Mean response length in tokens, end-of-turn token included."),
    Metric("response/truncated", "cut", "5.3f", "Share of responses cut off at rollout.max_response_tokens."),
    Metric("student/entropy", "H_S", "5.3f", "Mean entropy of the student's next-token distribution, nats."),
    Metric("teacher/entropy", "H_T", "5.3f", "The same of the privileged teacher, nats."),
    Metric("gate/mean", "gate", "5.3f", "Mean confidence gate omega; 1 leaves every token its weight."),
    Metric("gate/closed_share", "", "5.3f", "Share of tokens whose gate is below 1 - gamma / 2."),
    Metric("weight/clip_share", "clip", "5.3f", "Share of tokens whose ratio is outside [1 - eps, 1 + eps]."),
    Metric("contrast/selected_share", "", "5.3f", "RLCSD: share of tokens whose weight the contrast changes."),
    Metric("contrast/abs_mean", "", "6.3f", "RLCSD: mean |log pi_T| after a right against wrong rollouts, nats."),
    Metric("antisd/abs_mean", "", "6.3f", "AntiSD: mean |lambda g phi|, what its ascent adds to token weights."),
    Metric("srpo/distilled_share", "", "5.3f", "SRPO: share of trained tokens of wrong rollouts, which are distilled."),
    Metric("history/warmed", "", "3.0f", "AntiSD: steps that have calibrated its gate."),
    Metric("history/warm", "", "6.3f", "AntiSD: mean over them of the median teacher entropy, nats."),
    Metric("history/gate", "", "3.0f", "AntiSD: its gate g after the step, 0 or 1."),
    Metric("weight/log_ratio", "", "7.3f", "Mean log pi_T - log pi_S of the sampled tokens, nats."),
    Metric("weight/abs_mean", "", "6.3f", "Mean absolute token weight |W|."),
    Metric("loss/policy", "", "8.4f", "Loss: the policy loss, and the weighted divergence of an objective with one."),
    Metric("loss/divergence", "", "7.4f", "Mean divergence from the teacher, nats, if the objective asks for one."),
    Metric("loss/clip_share", "", "5.3f", "Share of tokens that the PPO clip stops; 0 with one update a batch."),
    Metric("loss/kl", "", "6.4f", "Mean KL divergence to the initial weights, nats; 0 without objective.kl_coef."),
    Metric("loss/importance", "", "6.3f", "Mean truncated importance weight c; 1 without objective.importance_cap."),
    Metric("optimizer/grad_norm", "|grad|", "8.3g", "Global gradient norm before clipping."),
    Metric("optimizer/lr", "", "8.2g", "Learning rate."),
    Metric("optimizer/updates", "", "3.0f", "Optimizer steps taken on the batch; 0 if no rollout has a signal."),
    Metric("optimizer/skipped", "", "3.0f", "Updates skipped: numbers not finite, or engine and SGLang disagree."),
    Metric("skipped/log_prob", "", "3.0f", "Updates skipped for a log-prob that is not finite."),
    Metric("skipped/loss", "", "3.0f", "Updates skipped for a loss that is not finite."),
    Metric("skipped/gradient", "", "3.0f", "Updates skipped for a gradient that is not finite."),
    Metric("skipped/disagreement", "", "3.0f", "Updates skipped: engine and SGLang differ by more than the limit."),
    Metric("sync/log_prob_difference", "dlogp", "7.1e", "Mean |log-prob(SGLang) - log-prob(engine)|, nats."),
    Metric("sync/routing_changed", "", "6.4f", "Share of tokens that the engine would route otherwise, over layers."),
    Metric("batch/tokens", "", "8.0f", "Response tokens of the batch."),
    Metric("batch/degenerate_share", "", "5.3f", "Share of rollouts with advantage 0, as in groups all right."),
    Metric("batch/sampled", "", "5.0f", "Rollouts sampled for the batch; more than it holds under dynamic sampling."),
    Metric("rollout/staleness", "", "5.2f", "Updates from the weights that sampled a token to those it trains: mean."),
    Metric("rollout/staleness/max", "", "2.0f", "The same: largest."),
    Metric("rollout/restarts", "", "3.0f", "Losses of SGLang servers so far; one that takes several counts once."),
    Metric("batch/micro_batches", "", "4.0f", "Micro-batches of the updates taken, per data-parallel rank."),
    Metric("perf/tokens_per_second", "tok/s", "6.0f", "Response tokens a second over the whole step, all devices."),
    Metric("perf/model_flops", "", "8.2e", "FLOPs of the step's scores and updates, without those of recomputation."),
    Metric("time/generate", "gen", "5.1f", "Seconds of sampling and rewarding the batch."),
    Metric("time/wait", "", "5.1f", "The part of it that training waited for; all of it on-policy."),
    Metric("time/score", "score", "5.1f", "Seconds of scoring with the teacher (and the old policy)."),
    Metric("time/train", "train", "5.1f", "Seconds of forward, backward and optimizer."),
    Metric("time/sync", "sync", "5.1f", "Seconds of sending the new weights to SGLang."),
    Metric("time/checkpoint", "", "5.1f", "Seconds that training stood still for checkpoints since the row before."),
    Metric("time/step", "", "6.1f", "Seconds of the whole step."),
    Metric("perf/mfu", "mfu", "5.3f", "Share of the devices' known bf16 peak that scoring and training reach."),
    Metric("evaluation/accuracy", "", "5.3f", "Held-out avg@k: share of right responses."),
    Metric("evaluation/accuracy/low", "", "5.3f", "Its 95 % bootstrap interval over the problems: lower end."),
    Metric("evaluation/accuracy/high", "", "5.3f", "The same: upper end."),
    Metric(
        "evaluation/accuracy/change/low",
        "",
        "+6.3f",
        "95 % interval of its change since the run's first evaluation, paired by problem: lower end.",
    ),
    Metric("evaluation/accuracy/change/high", "", "+6.3f", "The same: upper end."),
    Metric("evaluation/pass", "", "5.3f", "Held-out pass@k: share of problems with a right response among k."),
    Metric("evaluation/length/mean", "", "6.1f", "Held-out response length in tokens: mean."),
    Metric("evaluation/length/median", "", "6.1f", "The same: median."),
    Metric("evaluation/length/p95", "", "6.1f", "The same: 95th percentile."),
    Metric("evaluation/truncated", "", "5.3f", "Held-out share of responses cut off."),
    Metric("evaluation/k", "", "3.0f", "Responses per held-out problem."),
    Metric("evaluation/problems", "", "5.0f", "Held-out problems."),
]


def metrics_page() -> str:
    """Return the text of docs/reference/metrics.md."""
    rows = "\n".join(
        f"| `{m.key}` | {'`' + m.label.replace('|', chr(92) + '|') + '`' if m.label else ''} "
        f"| {m.meaning.replace('|', chr(92) + '|')} |"
        for m in METRICS
    )
    return (
        "# Metrics\n\n"
        "Every step writes one object to `metrics.jsonl`, the same numbers to `tensorboard/`, and the columns below "
        "to the console.\nA number that is not finite is `null` in the file. The file alone has `evaluation/right`: "
        "the right responses of each\nheld-out problem, in their order. This page is made from the table in "
        "`megatron_egrsd/run/metrics.py`:\n`python -m megatron_egrsd.run.metrics > docs/reference/metrics.md`.\n\n"
        f"| key | column | meaning |\n|---|---|---|\n{rows}\n"
    )


if __name__ == "__main__":
    print(metrics_page(), end="")
