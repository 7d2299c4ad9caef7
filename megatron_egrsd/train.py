"""EGRSD and CL-EGRSD: the training loop. Every rank runs this file; only the first one talks to SGLang.

Each step: the student samples n responses to each prompt and they are rewarded (sampling.py); `learn` takes the
direction from the rewards, the magnitude and the gate from the teacher, and updates the weights (learn.py); the new
weights go into SGLang, checked by version (first_rank.py).
"""

import time
from pathlib import Path

from transformers import AutoTokenizer

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import batch_indices, load_problems
from megatron_egrsd.data.prompts import PromptBuilder
from megatron_egrsd.engine import checkpoint
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.first_rank import FirstRank
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.learn import learn
from megatron_egrsd.plan import world_size
from megatron_egrsd.samples import Prompt


def main(config: Config) -> None:
    """Train as `config` says. BadArgument before anything is started, RunError where something fails later."""
    prompts, heldout, tokenizer = prepare(config)
    with Engine(config) as engine, FirstRank(config, engine, tokenizer) as first:
        start = first.resume()
        before = after = first.evaluate(heldout, step=start)
        for step in range(start, config.steps):
            started = time.perf_counter()
            batch = batch_indices(len(prompts), config.rollout.prompts_per_step, step, config.seed)
            rollouts = first.sample([prompts[i] for i in batch], version=step)
            generated = time.perf_counter()
            metrics = learn(engine, rollouts, config, first.recorder(step + 1, rollouts))
            first.check_agreement(metrics, step)
            trained = time.perf_counter()
            first.push_weights(version=step + 1)
            done = time.perf_counter()
            metrics |= {"time/generate": generated - started, "time/sync": done - trained, "time/step": done - started}
            first.report(step + 1, rollouts, metrics)
            if _is_due(step + 1, config.checkpoint.every, config.steps):
                checkpoint.save(engine, first.checkpoints, step + 1, config.checkpoint.keep)
            if _is_due(step + 1, config.evaluation.every or config.steps, config.steps):
                after = first.evaluate(heldout, step=step + 1)
        first.finish(before, after)


def _is_due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def prepare(config: Config, ranks: int | None = None) -> tuple[list[Prompt], list[Prompt], AutoTokenizer]:
    """Training prompts, held-out prompts, tokenizer: everything that can be refused before a process starts.

    `ranks` is for a plan of as many training ranks; without it, as torchrun says.
    """
    arch = Architecture.from_pretrained(config.model.path)
    arch.check_parallel(config.parallel.tensor, config.parallel.pipeline)
    config.check_world(ranks or world_size())
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not config.checkpoint.resume:
        raise BadArgument(
            f"output = {output} exists and is not an empty directory; choose another one, remove it, or continue its "
            "run with checkpoint.resume true"
        )
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
