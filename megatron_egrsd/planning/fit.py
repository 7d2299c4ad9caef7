"""Whether the memory of a configuration fits its GPUs, and which change would make it fit."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_egrsd.config import Config, LoraConfig, ParallelConfig
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.data.samples import Prompt
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapter_file import configured_spec
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.objectives import Objective
from megatron_egrsd.objectives.load import load_objective, needs_teacher
from megatron_egrsd.planning.activations import Placement
from megatron_egrsd.planning.memory import HeldTeacher, RankMemory, rank_memory


def placement(config: Config, gpu_memory: int | None) -> Placement:
    """Return the kernels to count: a GPU's if one exists or is planned, Transformer Engine's unless known missing."""
    here = torch.cuda.is_available()
    installed = not here or importlib.util.find_spec("transformer_engine") is not None
    on_gpu = here or gpu_memory is not None
    return Placement(on_gpu, on_gpu and installed and config.parallel.wants_transformer_engine(config.model.dtype))


@dataclass(frozen=True)
class Longest:
    """Tokens of the longest sequence that is trained, and of the longest one that the teacher scores, 0 if none is."""

    trained: int
    scored: int


def longest_sequences(config: Config, prompts: Sequence[Prompt]) -> Longest:
    """Return the lengths of prompt and response together. A teacher's prompt of other rollouts is not known before."""
    student, teacher = max(len(x.student_ids) for x in prompts), 0
    if needs_teacher(config.objective):
        built_later = config.data.reads_siblings
        teacher = config.data.max_prompt_tokens if built_later else max(len(x.teacher_ids) for x in prompts)
    response = config.rollout.max_response_tokens
    return Longest(student + response, teacher + response if teacher else 0)


def longest_micro_batch(config: Config, longest: int, ranks: int) -> int:
    """Return the tokens on one rank of the longest micro-batch if no sequence has more than `longest`."""
    p, share = config.parallel, config.parallel.tokens_on_a_rank(longest)
    samples = config.rollouts_per_update // (ranks // p.model_parallel)
    return max(share, min(p.max_tokens_per_microbatch, share * samples))


def memory_of_stages(
    config: Config,
    arch: Architecture,
    ranks: int,
    place: Placement,
    tokens: int,
    scored_tokens: int = 0,
    held_tokens: int | None = None,
) -> list[RankMemory]:
    """Return the bytes of a rank of each pipeline stage of `config`, as `rank_memory` does.

    `tokens` and `scored_tokens` are those of the longest micro-batch on a rank, of training and of the teacher;
    `held_tokens` the response tokens of a rank's rollouts, by default all of full length.
    """
    objective = load_objective(config.objective)
    return [
        rank_memory(
            arch,
            config.parallel,
            ranks,
            stage,
            place,
            tokens=tokens,
            scored_tokens=scored_tokens,
            itemsize=getattr(torch, config.model.dtype).itemsize,
            bucket_bytes=config.rollout.sync.bucket_mib << 20,
            teacher=config.teacher,
            needs_teacher=objective.needs_teacher,
            needs_reference=bool(config.objective.kl_coef),
            lora=configured_spec(config.lora),
            held=_held(config, objective, ranks, held_tokens) if objective.divergence is not None else None,
        )
        for stage in range(config.parallel.pipeline)
    ]


def memory_of_longest(
    config: Config, arch: Architecture, ranks: int, place: Placement, longest: Longest
) -> list[RankMemory]:
    """Return `memory_of_stages` of the longest micro-batches."""
    trained, scored = (longest_micro_batch(config, n, ranks) if n else 0 for n in (longest.trained, longest.scored))
    return memory_of_stages(config, arch, ranks, place, trained, scored)


def _held(config: Config, objective: Objective, ranks: int, tokens: int | None) -> HeldTeacher:
    """Return what the divergence of `objective` holds of the teacher's pass, as `Engine.hold_teacher` does."""
    if tokens is None:
        replicas = ranks // config.parallel.model_parallel
        rollouts = config.rollout.rollouts_per_step // replicas
        tokens = rollouts * -(-config.rollout.max_response_tokens // config.parallel.context)
    changes = config.optimizer.updates_per_batch > 1 and config.teacher.weights in ("live", "ema")
    cast = config.teacher.weights == "ema" and config.model.dtype != "float32"
    return HeldTeacher(
        tokens,
        copies_weight=not config.lora.enabled and (changes or cast),
        log_prob_grad=objective.has_policy_loss or bool(config.objective.kl_coef),
        top_k=objective.divergence.top_k,
    )


def remedy(config: Config, arch: Architecture, ranks: int, place: Placement, longest: Longest, gpu_memory: int) -> str:
    """Return advice: the first change of the parallel section, from mild to severe, with which the model fits.

    Adapters in place of all weights change what is trained, so they are named only if no layout fits.
    """
    p, spec = config.parallel, configured_spec(config.lora)

    def fits(other: Config) -> bool:
        return max(m.total for m in memory_of_longest(other, arch, ranks, place, longest)) <= gpu_memory

    for change in _changes(p, arch):
        try:
            other = replace(config, parallel=replace(p, **change))
            other.check_world(ranks)
            arch.check_parallel(other.parallel)
            if spec:
                spec.check(arch, other.parallel.tensor)
        except BadArgument:
            continue
        if fits(other):
            new = {k: v for k, v in change.items() if getattr(p, k) != v}
            words = (f"--parallel.{k} {json.dumps(v, separators=(',', ':'))}" for k, v in new.items())
            return f"it fits with {', '.join(words)}"
    sizes = "TP, EP, PP or CP" if arch.num_experts else "TP, PP or CP"
    none = f"neither recomputation, the distributed optimizer nor more {sizes} makes it fit"
    if not config.lora.enabled and p.tensor <= arch.num_kv_heads:
        targets = ATTENTION if arch.num_experts else TARGETS
        merged = replace(config.rollout, sync=replace(config.rollout.sync, lora="merged"))
        if fits(replace(config, lora=LoraConfig(rank=64, targets=list(targets)), rollout=merged)):
            names = f" --lora.targets {json.dumps(targets, separators=(',', ':'))}" if arch.num_experts else ""
            return f"{none}; adapters alone would fit: --lora.rank 64{names}"
    return f"{none}: it takes more GPUs"


def _changes(p: ParallelConfig, arch: Architecture) -> Iterator[dict[str, Any]]:
    """Yield changes of the parallel section that save memory, from mild to severe; some may not suit the model."""
    yield {"distributed_optimizer": True}
    yield {"recompute": True}
    both = {"recompute": True, "distributed_optimizer": True}
    yield both
    factors = (2, 4, 8)
    for tensor in (p.tensor * k for k in factors if p.tensor * k <= max(8, arch.num_kv_heads)):
        yield {"tensor": tensor, "sequence_parallel": p.sequence_parallel or arch.num_experts > 0} | both
    for expert in (p.expert * k for k in factors if arch.num_experts):
        yield {"expert": expert} | both
    for pipeline in (p.pipeline * k for k in factors):
        chunks = pipeline * p.virtual_pipeline
        if chunks <= arch.num_layers:
            uneven = arch.num_layers % chunks
            yield {"pipeline": pipeline, "pipeline_layout": arch.balanced_layers(chunks) if uneven else []} | both
    for context in (p.context * k for k in factors):
        yield {"context": context} | both
