"""EGRSD and CL-EGRSD: the training loop. Every rank runs this file; only the first one talks to SGLang.

Each step: the student samples n responses to each prompt and they are rewarded (batches.py, sampling.py); `learn` takes
the direction from the rewards, the magnitude and the gate from the teacher, and updates the weights (learn.py); the new
weights go into SGLang, checked by version (first_rank.py). One step off, the next batch is sampled meanwhile.
"""

import time
from pathlib import Path

from transformers import AutoTokenizer

from megatron_egrsd.agreement import facts
from megatron_egrsd.config import Config
from megatron_egrsd.data.prompts import load_prompts
from megatron_egrsd.debug import rollout_only
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.first_rank import first_rank
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.learn import learn
from megatron_egrsd.plan import world_size
from megatron_egrsd.preemption import Preemption
from megatron_egrsd.rewards import load_reward
from megatron_egrsd.rollout.process_group import use_sglangs_nccl_settings
from megatron_egrsd.samples import Prompt
from megatron_egrsd.sampling import prompt_builder
from megatron_egrsd.weighting import check_objective


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


def prepare(config: Config, ranks: int | None = None) -> tuple[list[Prompt], list[Prompt], AutoTokenizer]:
    """Training prompts, held-out prompts, tokenizer: everything that can be refused before a process starts.

    `ranks` is for a plan of as many training ranks; without it, as torchrun says.
    """
    arch = Architecture.from_pretrained(config.model.path)
    arch.check_parallel(config.parallel)
    config.check_world(ranks or world_size())
    check_objective(config.objective)
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not config.checkpoint.resume:
        raise BadArgument(
            f"output = {output} exists and is not an empty directory; choose another one, remove it, or continue its "
            "run with --resume auto"
        )
    if config.replay and not Path(config.replay).exists():
        raise BadArgument(f"replay is {config.replay}, which does not exist; give a file or directory of rollouts")
    load_reward(config.data.reward)
    builder = prompt_builder(config)
    train = load_prompts(config.data.train, builder, privileged=config.objective.needs_teacher)
    heldout = load_prompts(config.data.evaluation, builder, privileged=False) if config.data.evaluation else []
    return train, heldout, builder.tokenizer
