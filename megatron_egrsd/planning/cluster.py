"""Every division of a cluster's GPUs between training and serving, timed by step_time.py; the fastest that fits."""

import functools
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from megatron_egrsd.config import ParallelConfig, SyncConfig, TeacherConfig
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_parameters
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.operations import forward_flops
from megatron_egrsd.planning.activations import Placement
from megatron_egrsd.planning.machines import Machine
from megatron_egrsd.planning.memory import SERVER_SHARE, RankMemory, adapter_shards, rank_memory, shard_shapes
from megatron_egrsd.planning.step_time import (
    Batch,
    decode_step_seconds,
    generate_seconds,
    pass_seconds,
    step_seconds,
    sync_seconds,
    turn_seconds,
    update_seconds,
)

MODELS = json.loads((Path(__file__).parent / "published_models.json").read_text())

TRAINER_SHARE = 0.95  # of a GPU that a training rank may be planned to fill


@dataclass(frozen=True)
class Choice:
    """A division of the GPUs, and the memory (bytes) and time (seconds) that it takes.

    `moves`: of moving the `kept` bytes of a rank to host memory and back, if both use the same GPUs.
    """

    serving: int
    engine_tensor: int
    training: int
    parallel: ParallelConfig
    memory: int
    kept: int
    generate: float
    score: float
    train: float
    sync: float
    moves: float = 0.0

    @property
    def layout(self) -> str:
        p = self.parallel
        sizes = f"TP {p.tensor}"
        splits = ("PP", p.pipeline), ("VPP", p.virtual_pipeline), ("CP", p.context), ("EP", p.expert)
        for split, size in splits:
            sizes += f" {split} {size}" if size > 1 else ""
        sizes += f" ({min(p.pipeline_layout)} to {max(p.pipeline_layout)} layers)" if p.pipeline_layout else ""
        return f"{sizes} DP {self.training // p.model_parallel}" + (", recompute" if p.recompute else "")

    @property
    def step(self) -> float:
        return step_seconds(self.generate, self.score, self.train, self.sync, staleness=0) + self.moves

    @property
    def one_step_off(self) -> float:
        return step_seconds(self.generate, self.score, self.train, self.sync, staleness=1)

    @property
    def bottleneck(self) -> str:
        return max(("generate", "score", "train", "sync"), key=lambda phase: getattr(self, phase))


def long_tailed(count: int, cut: int) -> list[int]:
    """Return shuffled response lengths: quantiles of a lognormal of median 3,000 tokens and sigma 0.9, cut at `cut`."""
    normal = NormalDist(math.log(3000), 0.9)
    lengths = [min(cut, round(math.exp(normal.inv_cdf((i + 0.5) / count)))) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


def best(
    arch: Architecture, machine: Machine, gpus: int, batch: Batch, lora: AdapterSpec | None = None
) -> Choice | None:
    """Return the fastest division of `gpus` that fits, or None. `lora`: the adapters that are trained, if any are."""
    # In eighths: of a node if there is only one, else of the cluster, where a whole node either trains or serves.
    shares = [gpus * eighth // 8 for eighth in range(1, 8)]
    choices = itertools.chain(*(_choices(arch, machine, gpus - n, n, batch, lora) for n in shares))
    return min(choices, key=lambda choice: choice.step, default=None)


def best_in_turns(
    arch: Architecture, machine: Machine, gpus: int, batch: Batch, lora: AdapterSpec | None = None
) -> Choice | None:
    """Return the fastest layout in which all `gpus` train and sample in turns (colocated), or None."""
    choices = _choices(arch, machine, gpus, gpus, batch, lora)

    def in_turns(choice: Choice) -> Choice:
        # The servers give up their weights, and need all of them again, also if only adapters are trained.
        sync = sync_seconds(machine, arch, choice.parallel, SyncConfig().bucket_mib << 20)
        return replace(choice, sync=sync, moves=turn_seconds(machine, choice.kept))

    return min(map(in_turns, choices), key=lambda choice: choice.step, default=None)


def _choices(
    arch: Architecture, machine: Machine, serving: int, training: int, batch: Batch, lora: AdapterSpec | None = None
) -> Iterator[Choice]:
    if (served := sampling(arch, machine, serving, batch)) is None:
        return
    longest = batch.teacher_prompt + max(batch.responses)
    for parallel in _layouts(arch, machine, training, len(batch.responses), longest):
        memory = _memory(arch, parallel, training, lora)
        if memory.total > TRAINER_SHARE * machine.memory:
            continue
        phases = learning(arch, machine, training, parallel, batch, lora)
        yield Choice(serving, served[1], training, parallel, memory.total, memory.kept, served[0], *phases)


def learning(
    arch: Architecture, machine: Machine, training: int, parallel: ParallelConfig, batch: Batch,
    lora: AdapterSpec | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Return the seconds of scoring, training and weight sync of a step on `training` GPUs."""
    students = [batch.student_prompt + n for n in batch.responses]
    teachers = [batch.teacher_prompt + n for n in batch.responses]
    response_rows = sum(batch.responses)
    score = pass_seconds(machine, arch, parallel, training, teachers, response_rows, train=False, lora=lora)
    train = pass_seconds(machine, arch, parallel, training, students, response_rows, train=True, lora=lora)
    own = _trained(arch, parallel.tensor, parallel.pipeline, parallel.virtual_pipeline,
                   tuple(parallel.pipeline_layout), parallel.expert, lora)  # fmt: skip
    train += update_seconds(machine, parallel, training, own)
    return score, train, sync_seconds(machine, arch, parallel, SyncConfig().bucket_mib << 20, lora)


def sampling(arch: Architecture, machine: Machine, gpus: int, batch: Batch) -> tuple[float, int] | None:
    """Return (seconds, a server's TP) of sampling on `gpus`: the fastest TP whose KV cache holds a longest response."""
    cache = arch.kv_cache_bytes(2)
    found = []
    for tensor in (1, 2, 4, 8):
        if gpus % tensor:
            continue
        tokens = (SERVER_SHARE * machine.memory * tensor - 2 * arch.num_parameters) / cache
        if tokens < batch.student_prompt + max(batch.responses):
            continue
        engines = gpus // tensor
        slots = max(1, int(tokens // (batch.student_prompt + np.mean(batch.responses))))

        def step(running: int, context: float, tensor=tensor) -> float:
            return decode_step_seconds(machine, arch, tensor, running, context)

        shares = [batch.responses[i::engines] for i in range(min(engines, len(batch.responses)))]
        slowest = max(shares, key=sum)
        prefill = forward_flops(arch, [batch.student_prompt] * len(slowest)) / 8 / tensor / machine.flops  # shared by 8
        found.append((generate_seconds(step, slowest, batch.student_prompt, slots) + prefill, tensor))
    return min(found, default=None)


def _layouts(arch, machine, ranks, rollouts, longest) -> Iterator[ParallelConfig]:
    for tensor in (1, 2, 4, 8):
        for pipeline in (p for p in (1, 2, 3, 4, 6, 8, 12, 16) if p <= arch.num_layers):
            experts = (1, 2, 4, 8, 16) if arch.num_experts else (1,)
            for context, expert in itertools.product((1, 2, 4, 8), experts):
                replica = tensor * context * pipeline
                if tensor * context > machine.node or arch.num_kv_heads % tensor:
                    continue
                if ranks % replica or ranks % (pipeline * expert) or rollouts % (ranks // replica):
                    continue
                chunks = [v for v in (1, 2, 4) if v == 1 or 1 < pipeline <= arch.num_layers // v]
                for recompute, virtual in itertools.product((False, True), chunks):
                    uneven = arch.num_layers % (pipeline * virtual)
                    layout = ParallelConfig(
                        tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, expert=expert,
                        pipeline_layout=arch.balanced_layers(pipeline * virtual) if uneven else [],
                        recompute=recompute, sequence_parallel=tensor > 1, distributed_optimizer=True,
                        max_tokens_per_microbatch=-(-longest // context),
                    )  # fmt: skip
                    try:
                        arch.check_parallel(layout)
                    except BadArgument:
                        continue
                    yield layout


def _large_stages(arch: Architecture, parallel: ParallelConfig) -> set[int]:
    """Return the stages of which one is the largest: the first (embedding), the last (LM head), one of most layers."""
    layers = [sum(parallel.layers_of_stage(arch.num_layers, stage)) for stage in range(parallel.pipeline)]
    return {0, layers.index(max(layers)), parallel.pipeline - 1}


@functools.cache
def _trained(
    arch: Architecture, tensor: int, pipeline: int, virtual_pipeline: int, layout: tuple[int, ...], expert: int,
    lora: AdapterSpec | None,
) -> int:  # fmt: skip
    """Return the trained parameters of a rank of the pipeline stage that has most."""
    parallel = ParallelConfig(
        tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual_pipeline, pipeline_layout=list(layout), expert=expert
    )
    of_stage = functools.partial(adapter_shards, spec=lora) if lora else shard_shapes
    stages = (of_stage(arch, parallel, stage) for stage in _large_stages(arch, parallel))
    return max(sum(math.prod(shape) for chunk in chunks for shape in chunk.values()) for chunks in stages)


def _memory(arch: Architecture, parallel: ParallelConfig, ranks: int, lora: AdapterSpec | None) -> RankMemory:
    """Return the memory of the largest rank.

    Of equal stages it is on the first, with most micro-batches in flight, or on the last.
    """
    stages, place = _large_stages(arch, parallel), Placement(gpu=True, transformer_engine=True)
    tokens, bucket = parallel.max_tokens_per_microbatch, SyncConfig().bucket_mib << 20
    memory = (
        rank_memory(arch, parallel, ranks, stage, place, tokens=tokens, itemsize=2, bucket_bytes=bucket,
                    teacher=TeacherConfig(), lora=lora)
        for stage in stages
    )  # fmt: skip
    return max(memory, key=lambda m: m.total)


_COLUMNS = ("model", "GPUs", "rollouts", "serving", "training", "a GPU", "generate", "score", "train", "sync", "step",
            "one step off", "colocated", "bottleneck", "tokens/s a GPU")  # fmt: skip


def table(machine: Machine, models: list[str], rollouts: dict[int, int], cut: int, rank: int = 0) -> Iterator[str]:
    """Yield lines of Markdown: for each model and number of GPUs the fastest division that fits.

    `rollouts` has the rollouts of a step for each number of GPUs; responses are cut at `cut` tokens. Adapters of `rank`
    are trained, of a mixture of experts those of attention; all weights if it is 0.
    """
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for name in models:
        arch = architecture(name)
        lora = AdapterSpec(rank, 2 * rank, ATTENTION if arch.num_experts else TARGETS) if rank else None
        for gpus, count in rollouts.items():
            batch = Batch(300, 1500, long_tailed(count, cut))
            colocated = best_in_turns(arch, machine, gpus, batch, lora)
            cells = [Path(name).name, str(gpus), f"{count:,}"]
            if c := best(arch, machine, gpus, batch, lora):
                servers = f"{c.serving // c.engine_tensor} x TP {c.engine_tensor}"
                cells += [servers, f"{c.training}: {c.layout}", f"{c.memory / 2**30:.0f} GiB"]
                seconds = c.generate, c.score, c.train, c.sync, c.step, c.one_step_off
                cells += [f"{value:.1f} s" for value in seconds]
                last = [c.bottleneck, f"{sum(batch.responses) / c.step / gpus:,.0f}"]
            else:
                cells += ["does not fit", f"{training_state(arch, lora) / 2**30:,.0f} GiB to train", *[""] * 7]
                last = ["", ""]
            cells += [f"{colocated.step:.1f} s: {colocated.layout}" if colocated else "-", *last]
            yield f"| {' | '.join(cells)} |"


def training_state(arch: Architecture, lora: AdapterSpec | None = None) -> int:
    """Return the bytes of weights, gradients and Adam over all ranks: 2 + 4 + 12 a trained parameter, 2 a frozen one.

    A frozen teacher is 2 more; with adapters it is the frozen weights themselves.
    """
    return 2 * arch.num_parameters + 18 * adapter_parameters(arch, lora) if lora else 20 * arch.num_parameters


def architecture(name: str) -> Architecture:
    """Return the sizes of a published model, by its name, or of a directory with a config.json."""
    return Architecture.from_config(MODELS[name]) if name in MODELS else Architecture.from_pretrained(name)
