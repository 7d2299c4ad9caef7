"""Skipped updates: keep their rollouts, say why they were skipped, and end the run after too many in a row."""

from megatron_egrsd.config import Config
from megatron_egrsd.data.samples import Rollout, save_rollouts
from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.errors import RunError
from megatron_egrsd.run.run_directory import RunDirectory

# The reason for a skipped update, by the metric that `learn` reports.
_REASONS = {
    "skipped/log_prob": "a log-prob, SGLang's or the engine's, is not finite",
    "skipped/loss": "the loss is not finite",
    "skipped/gradient": "the gradient is not finite",
    "skipped/disagreement": "SGLang's log-probs differ from the engine's by {difference:.3g} nats on average "
    "(max_log_prob_difference = {limit:g}): it holds other weights, which rollout.sync.verify true would name, "
    "computes differently or, under rollout.staleness, is further behind than its updates should leave it",
}


class UpdateGuard:
    """Counter of steps in a row that have skipped an update, one of several too. Every rank makes the same calls."""

    def __init__(self, config: Config, directory: RunDirectory):
        self.directory, self.limit, self.max_skipped = directory, config.log_prob_limit, config.max_skipped_steps
        self.skipped = 0  # steps in a row

    def check(self, step: int, rollouts: list[Rollout], metrics: dict[str, float]) -> str:
        """Return "" if every update of `step` (from 1) was applied; else dump its rollouts and return the reason.

        Raises RunError if more than `max_skipped_steps` steps in a row have skipped an update.
        """
        values = {"difference": metrics.get("sync/log_prob_difference"), "limit": self.limit}
        reasons = [text.format(**values) for key, text in _REASONS.items() if metrics.get(key)]
        self.skipped = self.skipped + 1 if reasons else 0
        if not reasons:
            return ""
        path = self.directory.dump("skipped", step)
        on_first_rank(lambda: save_rollouts(rollouts, path))
        sentence = f"step {step} skips an update: {reasons[0]}; its rollouts are in {path}"
        if self.skipped > self.max_skipped:
            raise RunError(f"{sentence}; {self.skipped} in a row are too many (max_skipped_steps)")
        return sentence
