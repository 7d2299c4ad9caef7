"""The resolved plan of a run, before anything is started: `megatron-egrsd train --dry-run`."""

import os
from dataclasses import asdict

import yaml

from megatron_egrsd.config import Config
from megatron_egrsd.hf.architecture import Architecture


def world_size() -> int:
    """Training ranks: what torchrun says, else one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def describe_plan(config: Config, num_train: int, num_heldout: int) -> str:
    """Configuration, model, layout and batch arithmetic as text. BadArgument where the sizes do not divide."""
    arch = Architecture.from_pretrained(config.model.path)
    ranks = world_size()
    data_parallel = config.check_world(ranks)
    p, r, o = config.parallel, config.rollout, config.optimizer
    padded = arch.padded_vocab_size(p.tensor)
    updates = config.steps * o.updates_per_batch
    epochs = config.steps * r.prompts_per_step / num_train
    lines = [
        f"model       {arch.num_parameters:,} parameters, {arch.num_layers} layers, {config.model.dtype}",
        f"vocabulary  {arch.vocab_size:,} tokens, padded to {padded:,} ({padded // p.tensor:,} a rank)",
        f"layout      {ranks} ranks = TP {p.tensor} x PP {p.pipeline} x DP {data_parallel}"
        + (", sequence parallel" if p.sequence_parallel else "")
        + (", distributed optimizer" if p.distributed_optimizer else ""),
        f"batch       {r.prompts_per_step} prompts x {r.rollouts_per_prompt} rollouts = {r.rollouts_per_step} a step, "
        f"{r.rollouts_per_step // o.updates_per_batch} an update, at most {p.max_tokens_per_microbatch:,} tokens a "
        "micro-batch",
        f"run         {config.steps} steps, {updates} updates, {epochs:.2f} epochs of {num_train} problems; "
        f"{num_heldout} held-out problems",
        "rollouts    " + (f"at {', '.join(r.urls)}" if r.urls else f"{r.engines} SGLang server(s) on {r.host}"),
        f"output      {config.output}",
    ]
    return yaml.safe_dump(asdict(config), sort_keys=False) + "\n" + "\n".join(lines)
