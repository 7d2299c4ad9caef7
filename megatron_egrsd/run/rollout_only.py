"""`debug: rollout-only`: sampling and rewards alone. The other half of a run is rollout_source.ReplayedRollouts."""

import contextlib
import functools
import time
from dataclasses import replace
from pathlib import Path

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import batch_indices
from megatron_egrsd.data.samples import Prompt, save_rollouts
from megatron_egrsd.data.stopping import stop_token_ids
from megatron_egrsd.evaluation.evaluated_model import hugging_face
from megatron_egrsd.learn import rollout_metrics
from megatron_egrsd.objectives.interface import rollout_advantages
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.server_command import with_arguments
from megatron_egrsd.rollout.servers import RolloutServers, retry_lost
from megatron_egrsd.run.health import Health
from megatron_egrsd.run.log import RunLog
from megatron_egrsd.sampling.sampler import training_sampler
from megatron_egrsd.system.files import locked


def rollout_only(config: Config, prompts: list[Prompt], tokenizer) -> None:
    """Sample and reward every step's batch with model.path, and the adapter lora.init; write it to output/rollouts.

    Runs in one process, without torch.distributed and megatron-core. `debug: train-only` can train on its rollouts.
    """
    output, settings, servers_config = Path(config.output), config.rollout, with_arguments(config.rollout)
    with (
        locked(output),
        hugging_face(config) as path,
        RolloutServers(servers_config, replace(config.model, path=path), config.seed, output / "logs") as servers,
        contextlib.closing(RunLog(output, config.steps, config=config)) as log,
    ):
        stop = stop_token_ids(tokenizer, config.data, settings.stop_tokens)
        client = RolloutClient(servers, settings, stop)
        sampler = training_sampler(config, client, tokenizer)
        history, health = History(), Health(config)
        for step in range(config.steps):
            started = time.perf_counter()
            batch = batch_indices(len(prompts), settings.prompts_per_step, step, config.seed)
            chosen, done = [prompts[i] for i in batch], {}  # finished responses outlive the servers that sampled them
            servers.bring_back()  # those that were lost in the step before
            sample = functools.partial(sampler.sample, chosen, settings.rollouts_per_prompt, settings, done)
            rollouts = sampler.contexts(retry_lost(sample, lambda _: servers.bring_back()))
            seconds = time.perf_counter() - started
            objective = load_objective(config.objective, history)
            rewards, advantage = rollout_advantages(rollouts, objective, settings.max_response_tokens)
            history = history.after(rewards)
            metrics = rollout_metrics(rollouts, rewards, advantage) | {"time/generate": seconds, "time/step": seconds}
            log.step({"step": step + 1} | metrics)
            for warning in health.warnings(step + 1, metrics):
                log.message(warning)
            save_rollouts(rollouts, output / "rollouts" / f"step_{step + 1:06d}.jsonl")
