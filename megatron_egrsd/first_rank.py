"""What only the first rank does: SGLang, the reward, the log, the files. train.py calls it from every rank."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path

import yaml

from megatron_egrsd.config import Config
from megatron_egrsd.console import RunLog
from megatron_egrsd.engine import checkpoint
from megatron_egrsd.engine.distributed import on_first_rank, on_first_rank_while
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.checkpoint import save_hf
from megatron_egrsd.report import plot_frontier, summary_table
from megatron_egrsd.rewards import load_reward
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync
from megatron_egrsd.samples import Prompt, Rollout, save_rollouts
from megatron_egrsd.sampling import Sampler, summarize
from megatron_egrsd.scores import Record, gather_scores, save_scores, scored_rollouts


class FirstRank:
    """SGLang, the reward and the log, all on the first rank. Every rank makes the same calls; results reach all."""

    def __init__(self, config: Config, engine: Engine, tokenizer):
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"

    def __enter__(self) -> "FirstRank":
        self.stack = contextlib.ExitStack()
        try:
            on_first_rank(self._start)
        except BaseException:
            self.stack.close()
            raise
        return self

    def _start(self) -> None:
        config = self.config
        where = (
            ", ".join(config.rollout.urls)
            or f"{config.rollout.engines} SGLang server(s), log in {self.output / 'logs'}"
        )
        print(f"rollouts: {where}; starting takes up to a minute", flush=True)
        self.servers = self.stack.enter_context(
            RolloutServers(config.rollout, config.model, config.seed, self.output / "logs")
        )
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        self.sync = WeightSync(self.servers, config.rollout, self.engine.device, self.output)
        self.stack.callback(self.sync.close)
        client = RolloutClient(self.servers, config.rollout, [self.tokenizer.eos_token_id])
        self.sampler = Sampler(client, self.tokenizer, load_reward(config.data.reward))
        self.log = RunLog(self.output, config.steps)
        self.stack.callback(self.log.close)
        self.evaluations = []

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def resume(self) -> int:
        """The step to continue from: 0, or that of the newest complete checkpoint, which is then loaded and served."""
        path = on_first_rank(lambda: checkpoint.newest(self.checkpoints)) if self.config.checkpoint.resume else None
        if path is None:
            return 0
        step = checkpoint.load(self.engine, path)
        if step >= self.config.steps:
            raise BadArgument(f"{self.output} has finished its {step} steps; raise steps to train on")
        self.push_weights(version=step)
        if self.engine.is_first_rank:
            self.log.message(f"continuing from {path}")
            # What the stopped run left behind its last checkpoint makes room, and is not lost.
            dumps = [p for kind in ("rollouts", "scores") for p in self.output.glob(f"{kind}/step_*.jsonl")]
            stale = [p for p in dumps if int(p.stem.removeprefix("step_")) > step]
            for left in [*stale, *self.output.glob("hf")]:
                left.rename(left.with_name(f"{left.name}.before-{time.time_ns()}"))
        return step

    def sample(self, prompts: list[Prompt], version: int) -> list[Rollout]:
        """One batch of rewarded rollouts, on every rank."""
        n, temperature = self.config.rollout.rollouts_per_prompt, self.config.rollout.temperature
        rollouts = on_first_rank(lambda: self.sampler.sample(prompts, n, temperature))
        stale = {r.weight_version for r in rollouts} - {version}
        if stale:
            raise RunError(f"SGLang sampled with weight version {min(stale)}, but the engine holds version {version}")
        return rollouts

    def push_weights(self, version: int) -> None:
        """The engine's weights into SGLang; every rank streams its part. RunError names what did not arrive."""
        weights = self.engine.export_weights()
        on_first_rank_while(lambda: self.sync.push(weights, version), weights)
        if self.config.rollout.verify_sync:
            weights = self.engine.export_weights()
            on_first_rank_while(lambda: self.sync.verify(weights), weights)

    def recorder(self, step: int, rollouts: list[Rollout]) -> Record | None:
        """What `learn` calls with the scores of `rollouts` where dump_scores is set; None where it is not."""

        def record(advantage, student, teacher) -> None:
            student, teacher = gather_scores(self.engine, student), gather_scores(self.engine, teacher)
            objective, vocab_size = self.config.objective, self.engine.arch.vocab_size
            batch = rollouts, advantage, student, teacher, objective, self.tokenizer
            path = self.output / "scores" / f"step_{step:06d}.jsonl"
            on_first_rank(lambda: save_scores(scored_rollouts(*batch, step=step, vocab_size=vocab_size), path))

        return record if self.config.dump_scores else None

    def check_agreement(self, metrics: dict[str, float], step: int) -> None:
        """RunError where engine and SGLang disagree about the sampled tokens."""
        difference = metrics.get("sync/log_prob_difference", 0.0)
        if difference <= self.config.max_log_prob_difference:
            return
        raise RunError(
            f"step {step + 1}: SGLang's log-probs differ from the engine's by {difference:.3g} nats on average "
            f"(max_log_prob_difference = {self.config.max_log_prob_difference:g}): they hold other weights, which "
            "rollout.verify_sync true would name, or compute differently"
        )

    def evaluate(self, prompts: list[Prompt], step: int) -> dict[str, float]:
        """Held-out avg@k; an empty dictionary without held-out problems."""

        def run() -> dict[str, float]:
            settings = self.config.evaluation
            result = summarize(self.sampler.sample(prompts, settings.rollouts_per_problem, settings.temperature))
            self.evaluations.append(result | {"step": step})
            self.log.evaluation(step, result)
            return result

        return on_first_rank(run) if prompts else {}

    def report(self, step: int, rollouts: list[Rollout], metrics: dict[str, float]) -> None:
        if self.engine.is_first_rank:
            metrics["perf/tokens_per_second"] = metrics["batch/tokens"] / metrics["time/step"]
            self.log.step({"step": step} | metrics)
            if self.config.dump_rollouts:
                save_rollouts(rollouts, self.output / "rollouts" / f"step_{step:06d}.jsonl")

    def finish(self, before: dict[str, float], after: dict[str, float]) -> None:
        """The final Hugging Face checkpoint, the table and the plot."""
        weights = self.engine.export_weights()
        on_first_rank_while(lambda: save_hf(weights, self.config.model.path, self.output / "hf"), weights)
        if self.engine.is_first_rank and self.evaluations:
            self.log.message(summary_table(before, after))
            plot_frontier(self.evaluations, self.output / "frontier.png")
            self.log.message(f"model {self.output / 'hf'}   plot {self.output / 'frontier.png'}")
