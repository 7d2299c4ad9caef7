"""`debug: rollout-only`: sampling and rewards alone. The other half of a run is offline_rollouts.replayed_batches."""

import contextlib
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import Place
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
from megatron_egrsd.run.run_directory import RunDirectory
from megatron_egrsd.sampling.batches import Batches
from megatron_egrsd.sampling.sampler import training_sampler
from megatron_egrsd.system.files import locked


def rollout_only(config: Config, prompts: list[Prompt], tokenizer) -> None:
    """Sample and reward every step's batch with model.path, and the adapter lora.init; write it to output/rollouts.

    Runs in one process, without torch.distributed and megatron-core. `debug: train-only` can train on its rollouts.
    """
    directory, settings = RunDirectory(config), config.rollout
    with (
        locked(directory.path),
        hugging_face(config) as path,
        ThreadPoolExecutor(1) as thread,
        RolloutServers(
            with_arguments(settings), replace(config.model, path=path), config.seed, directory.path / "logs"
        ) as servers,
    ):
        client = RolloutClient(servers, settings, stop_token_ids(tokenizer, config.data, settings.stop_tokens))
        sampler = training_sampler(config, client, tokenizer)
        batches = Batches(sampler, thread, settings, config.objective, config.seed, Place())
        history, health = History(), Health(config)
        directory.begin(None)
        with contextlib.closing(RunLog(directory.path, config.steps, config=config)) as log:
            for step in range(config.steps):
                started = time.perf_counter()
                servers.bring_back()  # those that were lost in the step before
                sample = functools.partial(batches.batch, prompts, step)
                batch = retry_lost(sample, lambda _: servers.bring_back())
                objective = load_objective(config.objective, history)
                rewards, advantage = rollout_advantages(batch.rollouts, objective, settings.max_response_tokens)
                history = history.after(rewards)
                metrics = rollout_metrics(batch.rollouts, rewards, advantage) | {
                    "batch/sampled": float(batch.sampled),
                    "time/generate": batch.seconds,
                    "time/step": time.perf_counter() - started,
                }
                log.step({"step": step + 1} | metrics)
                for warning in health.warnings(step + 1, metrics):
                    log.message(warning)
                save_rollouts(batch.rollouts, directory.dump("rollouts", step + 1))
