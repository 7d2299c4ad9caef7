"""EGRSD and CL-EGRSD: the training loop. Every rank runs this file; only the first one talks to SGLang.

Each step: the student samples n responses to each prompt and they are rewarded (sampling.py); `learn` takes the
direction from the rewards, the magnitude and the gate from the teacher, and updates the weights (learn.py); the new
weights go into SGLang, checked by version.
"""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path

import yaml
from transformers import AutoTokenizer

from megatron_egrsd.config import Config
from megatron_egrsd.console import RunLog
from megatron_egrsd.data.problems import batch_indices, load_problems
from megatron_egrsd.data.prompts import PromptBuilder
from megatron_egrsd.engine.distributed import on_first_rank, on_first_rank_while
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.checkpoint import save_hf
from megatron_egrsd.learn import learn
from megatron_egrsd.plan import describe_plan, world_size
from megatron_egrsd.report import plot_frontier, summary_table
from megatron_egrsd.rewards import load_reward
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync
from megatron_egrsd.samples import Prompt, Rollout, save_rollouts
from megatron_egrsd.sampling import Sampler, summarize


def main(config: Config) -> None:
    """Train as `config` says. BadArgument before anything is started, RunError where something fails later."""
    prompts, heldout, tokenizer = prepare(config)
    with Engine(config) as engine, FirstRank(config, engine, tokenizer) as first:
        before = first.evaluate(heldout, step=0)
        for step in range(config.steps):
            started = time.perf_counter()
            batch = [
                prompts[i] for i in batch_indices(len(prompts), config.rollout.prompts_per_step, step, config.seed)
            ]
            rollouts = first.sample(batch, version=step)
            generated = time.perf_counter()
            metrics = learn(engine, rollouts, config)
            first.check_agreement(metrics, step)
            synced = time.perf_counter()
            first.push_weights(version=step + 1)
            first.report(
                step + 1,
                rollouts,
                metrics
                | {
                    "time/generate": generated - started,
                    "time/sync": time.perf_counter() - synced,
                    "time/step": time.perf_counter() - started,
                },
            )
            last = step + 1 == config.steps
            if last or (config.evaluation.every and (step + 1) % config.evaluation.every == 0):
                after = first.evaluate(heldout, step=step + 1)
        first.finish(before, after)


def prepare(config: Config) -> tuple[list[Prompt], list[Prompt], AutoTokenizer]:
    """Training prompts, held-out prompts, tokenizer: everything that can be refused before a process starts."""
    arch = Architecture.from_pretrained(config.model.path)
    arch.check_parallel(config.parallel.tensor, config.parallel.pipeline)
    config.check_world(world_size())
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadArgument(f"output = {output} exists and is not an empty directory; choose another one or remove it")
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    builder = PromptBuilder(tokenizer, config.data, config.rollout.max_response_tokens, arch.max_position_embeddings)
    privileged = config.objective.needs_teacher
    train = load_problems(config.data.train, config.data, privileged=privileged)
    heldout = load_problems(config.data.evaluation, config.data, privileged=False) if config.data.evaluation else []
    return (
        [builder.build(p, privileged=privileged) for p in train],
        [builder.build(p, privileged=False) for p in heldout],
        tokenizer,
    )


def print_plan(config: Config) -> None:
    """Check everything that can be checked without starting a process, and print the resolved plan."""
    prompts, heldout, _ = prepare(config)
    print(describe_plan(config, len(prompts), len(heldout)))


class FirstRank:
    """SGLang, the reward and the log, all on the first rank. Every rank makes the same calls; results reach all."""

    def __init__(self, config: Config, engine: Engine, tokenizer):
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.output = Path(config.output)

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
