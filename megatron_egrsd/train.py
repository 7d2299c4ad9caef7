"""EGRSD and CL-EGRSD: the training loop. Every rank runs this file; only the first one talks to SGLang.

Each step: the student samples n responses to each prompt and they are rewarded (batches.py, sampling.py); `learn` takes
the direction from the rewards, the magnitude and the gate from the teacher, and updates the weights (learn.py); the new
weights go into SGLang, checked by version (first_rank.py). One step off, the next batch is sampled meanwhile.
"""

import time

from megatron_egrsd.config import Config
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import RunError
from megatron_egrsd.learn import learn
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.rollout.process_group import use_sglangs_nccl_settings
from megatron_egrsd.run.agreement import facts
from megatron_egrsd.run.preemption import Preemption
from megatron_egrsd.run.rollout_only import rollout_only
from megatron_egrsd.run.session import first_rank


def main(config: Config) -> None:
    """Train as `config` says. BadArgument before anything is started, RunError where something fails later.

    A RunError reaches every rank alike, between two updates: the state is saved before it goes on.
    """
    prompts, heldout, tokenizer = prepare(config)
    if config.debug == "rollout-only":
        rollout_only(config, prompts, tokenizer)
        return
    if config.rollout.weight_sync == "distributed":
        use_sglangs_nccl_settings()
    with (
        Engine(config, facts(config, prompts)) as engine,
        Preemption() as preemption,
        first_rank(config, engine, tokenizer, preemption) as first,
    ):
        step = first.resume()
        try:
            if config.evaluation.at_start:
                first.evaluate(heldout, step)
            while step < config.steps:
                first.check_preemption()
                started = time.perf_counter()
                batch = first.batch(prompts, step)
                first.sample_ahead(prompts, step + 1)
                sampled = time.perf_counter()
                metrics = learn(engine, batch.rollouts, config, first.recorder(step + 1, batch.rollouts))
                step += 1
                first.guard(step, batch.rollouts, metrics)
                trained = time.perf_counter()
                first.await_sampling()
                waited = time.perf_counter()
                first.push_weights(step)
                done = time.perf_counter()
                metrics |= {"batch/sampled": batch.sampled, "time/generate": batch.seconds}
                metrics |= {"time/wait": sampled - started + waited - trained, "time/sync": done - waited}
                metrics |= {"time/step": done - started}
                first.report(step, batch.rollouts, metrics)
                if _is_due(step, config.evaluation.every or config.steps, config.steps):
                    first.evaluate(heldout, step)
                if _is_due(step, config.checkpoint.every, config.steps):
                    first.save(step)
        except RunError as error:
            raise first.stopped(error, step) from error
        first.finish()


def _is_due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)
