"""The resolved plan of a run, before anything is started: `megatron-egrsd train --dry-run`.

It needs one process and no GPU for any world size. A run that cannot work is refused after the plan, with the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml

from megatron_egrsd.config import Config, ParallelConfig
from megatron_egrsd.data.packing import schedule
from megatron_egrsd.data.prompt_builder import UNUSED_TOKENS
from megatron_egrsd.data.samples import Prompt
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapter_file import configured_spec
from megatron_egrsd.hf.adapters import adapter_parameters, trained_parameters
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.checkpoint import HFCheckpoint, holds_weights
from megatron_egrsd.hf.staging import free_bytes
from megatron_egrsd.objectives.load import load_objective, needs_rollouts, needs_teacher
from megatron_egrsd.planning.fit import (
    Longest,
    longest_micro_batch,
    longest_sequences,
    memory_of_longest,
    placement,
    remedy,
)
from megatron_egrsd.planning.memory import SERVER_SHARE
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.rollout.ports import choose_ports
from megatron_egrsd.system import torchrun


def readable(size: float) -> str:
    """Format bytes in the largest fitting unit."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 2**10:.2f} KiB"


def print_plan(config: Config, ranks: int | None = None, gpu_memory: int | None = None) -> None:
    """Check everything that needs no new process, and print the resolved plan, once per job.

    Of `ranks` training ranks (default: torchrun's, else one) on GPUs of `gpu_memory` bytes (default: the size that
    torch reports, and no check if there is no GPU). With either the plan is another machine's, and the GPUs and nodes
    of this one are not looked at. Raises BadArgument if something cannot work; if the plan shows it, the plan is
    printed before.
    """
    if torchrun.rank() != 0:
        return
    here = ranks is None and gpu_memory is None
    ranks = ranks or torchrun.world_size()
    prompts, heldout, _ = prepare(config, None if here else ranks)
    plan = resolve(config, prompts, heldout, ranks, gpu_memory)
    print(yaml.safe_dump(asdict(config), sort_keys=False) + "\n" + "\n".join(plan.lines))
    if plan.refusals:
        raise BadArgument("this plan cannot work: " + "; ".join(plan.refusals))


@dataclass
class Plan:
    """The lines of the plan, and the reasons why it cannot work."""

    lines: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def add(self, name: str, *texts: str) -> None:
        for text in texts:
            self.lines.append(f"{name:<12}{text}")
            name = ""


def resolve(
    config: Config, prompts: Sequence[Prompt], heldout: Sequence[Prompt], ranks: int, gpu_memory: int | None = None
) -> Plan:
    """Plan model, layout, batch, memory, servers and disk of a run. Raises BadArgument if the sizes do not divide."""
    arch = Architecture.from_pretrained(config.model.path)
    plan = Plan()
    if gpu_memory is None and torch.cuda.is_available():
        gpu_memory = torch.cuda.get_device_properties(0).total_memory
    data_parallel = config.check_world(ranks)
    _add_model(plan, config, arch, ranks, data_parallel)
    longest = _add_batch(plan, config, prompts, heldout, data_parallel)
    if config.debug != "rollout-only":
        _add_memory(plan, config, arch, ranks, longest, gpu_memory)
    if not needs_rollouts(config.objective):
        plan.add("rollouts", "none: the reference solutions are trained, and no server starts")
    elif config.debug != "train-only":
        _add_servers(plan, config, arch, longest.trained, gpu_memory)
    if config.debug != "rollout-only":
        _add_disk(plan, config, arch)
    return plan


def _add_model(plan: Plan, config: Config, arch: Architecture, ranks: int, data_parallel: int) -> None:
    """Add the model, its weights and its layout, and a refusal if its weights cannot be loaded."""
    p = config.parallel
    padded = arch.padded_vocab_size(p.tensor)
    plan.add("model", f"{arch.num_parameters:,} parameters, {arch.num_layers} layers, {config.model.dtype}")
    if spec := configured_spec(config.lora):
        count = adapter_parameters(arch, spec)
        plan.add("", f"LoRA r {spec.rank}, alpha {spec.alpha:g}, on {', '.join(spec.targets)}: {count:,} parameters "
                     f"({count / arch.num_parameters:.2%}) are trained")  # fmt: skip
    _add_weights(plan, config)
    plan.add(
        "vocabulary",
        f"{arch.vocab_size:,} tokens, padded to {padded:,} ({padded // p.tensor:,} a tensor-parallel rank)",
    )
    plan.add(
        "layout",
        f"{ranks} ranks = TP {p.tensor} x PP {p.pipeline}"
        + (f" x CP {p.context}" if p.context > 1 else "")
        + f" x DP {data_parallel}"
        + (f", VPP {p.interleaved}" if p.interleaved else "")
        + (f", EP {p.expert}" if p.expert > 1 else "")
        + (", sequence parallel" if p.sequence_parallel else "")
        + (", distributed optimizer" if p.distributed_optimizer else "")
        + (", recomputation" if p.recompute else ""),
    )
    if p.megatron:
        from megatron_egrsd.engine.model import check_megatron

        check_megatron(p)
        plan.add("", f"parallel.megatron ({', '.join(p.megatron)}) is not counted below")


def _add_batch(plan: Plan, config: Config, prompts, heldout, data_parallel: int) -> Longest:
    """Add the batch, its sequences and the length of the run; returns the tokens of the longest possible sequences."""
    p, r, o = config.parallel, config.rollout, config.optimizer
    per_update = config.rollouts_per_update
    per_rank = per_update // data_parallel
    plan.add(
        "batch",
        f"{r.prompts_per_step} prompts x {r.rollouts_per_prompt} rollouts = {r.rollouts_per_step} a step, "
        f"{per_update} an update, {per_rank} of them a data-parallel rank",
    )
    if config.data.teacher_context == "majority" and needs_teacher(config.objective):
        plan.add("", f"the teacher reads the answer that most of the {r.rollouts_per_prompt} rollouts of a prompt "
                     f"give, if it fits into {config.data.max_prompt_tokens:,} tokens")  # fmt: skip
    elif config.data.reads_siblings and needs_teacher(config.objective):
        most = 1 + (config.data.wrong_siblings if load_objective(config.objective).needs_contexts else 0)
        plan.add("", f"the teacher scores each response after {min(most, r.rollouts_per_prompt - 1)} or fewer others "
                     f"of its prompt, those that fit into {config.data.max_prompt_tokens:,} tokens")  # fmt: skip
    longest = longest_sequences(config, prompts)
    budget, share = p.max_tokens_per_microbatch, p.tokens_on_a_rank(longest.trained)
    most = len(schedule([[share] * per_rank], budget, p.round_of_micro_batches)[0])
    bubble = f", {_bubble(p, most)} of the time in the pipeline's bubble" if p.pipeline > 1 else ""
    plan.add(
        "",
        f"sequences of at most {longest.trained:,} tokens"
        + (f", {share:,} of them on each CP rank," if p.context > 1 else "")
        + f" in micro-batches of at most {budget:,}: at most {most} an update a rank{bubble}",
    )
    if longest.scored:
        plan.add("", f"the teacher scores sequences of at most {longest.scored:,} tokens")
    if share > budget:
        plan.add(
            "", f"a sequence longer than parallel.max_tokens_per_microbatch = {budget:,} is a micro-batch of its own"
        )
    plan.add(
        "run",
        f"{config.steps} steps, {config.steps * o.updates_per_batch} updates, "
        f"{config.steps * r.prompts_per_step / len(prompts):.2f} epochs of {len(prompts)} problems; "
        f"{len(heldout)} held-out problems",
    )
    return longest


def _add_weights(plan: Plan, config: Config) -> None:
    """Add what the headers of the weights say, and a refusal if they are not the model's, incomplete, or quantised.

    A directory without any weights is planned as well: the model may lie on the cluster.
    """
    if not holds_weights(Path(config.model.path)):
        plan.add("", "no weights are in model.path: a run needs them")
        return
    try:
        plan.add("", f"weights: {HFCheckpoint(config.model.path).describe()}")
    except BadArgument as error:
        plan.refusals.append(str(error))


def _bubble(parallel: ParallelConfig, micro_batches: int) -> str:
    """Return the share of time that a stage waits: (P - 1) / (M V + P - 1); Narayanan et al. 2021, arXiv 2104.04473."""
    waits, works = parallel.pipeline - 1, micro_batches * parallel.virtual_pipeline
    return f"{waits / (works + waits):.0%}"


def _add_memory(
    plan: Plan, config: Config, arch: Architecture, ranks: int, longest: Longest, gpu_memory: int | None
) -> None:
    """Add the bytes of the largest rank, term by term, and a refusal if they exceed the GPU's memory."""
    place, tokens = placement(config, gpu_memory), longest_micro_batch(config, longest.trained, ranks)
    stages = memory_of_longest(config, arch, ranks, place, longest)
    worst = max(stages, key=lambda m: m.total)
    kind = "a GPU with Transformer Engine" if place.transformer_engine else "a GPU" if place.gpu else "the CPU"
    plan.add(
        "memory", f"of rank {worst.rank} (pipeline stage {worst.stage}), {tokens:,} tokens a micro-batch, on {kind}"
    )
    for name, size in worst.resident.items():
        plan.add("", f"  {name:<45}{readable(size):>12}")
    plan.add("", f"  at the peak, the {worst.peak_phase}:")
    for name, size in worst.phases[worst.peak_phase].items():
        plan.add("", f"    {name:<43}{readable(size):>12}")
    limit = f" of {readable(gpu_memory)}" if gpu_memory else ""
    plan.add("", f"  {'total':<45}{readable(worst.total):>12}{limit}")
    if others := [m for m in stages if m.stage != worst.stage]:
        lightest = min(others, key=lambda m: m.total)
        plan.add("", f"  the other stages need less, rank {lightest.rank} (stage {lightest.stage}) the least: "
                     f"{readable(lightest.total)}")  # fmt: skip
    if config.rollout.servers.colocated:
        plan.add("", f"  {'in host memory while SGLang samples':<45}{readable(worst.kept):>12}, "
                     f"{readable(worst.kept * ranks)} for {ranks} ranks")  # fmt: skip
    if gpu_memory and worst.total > gpu_memory:
        plan.refusals.append(
            f"rank {worst.rank} needs {readable(worst.total)} but a GPU has {readable(gpu_memory)}; "
            + remedy(config, arch, ranks, place, longest, gpu_memory)
        )


def _add_servers(plan: Plan, config: Config, arch: Architecture, longest: int, gpu_memory: int | None) -> None:
    """Add the source of the responses: ports, GPUs, memory for weights and KV cache, and refusals."""
    r = config.rollout.servers
    if r.urls:
        plan.add("rollouts", f"at {', '.join(r.urls)} (not asked)")
        return
    ports = [r.port + i for i in range(r.engines)] if r.port else []
    on = f"ports {ports[0]} to {ports[-1]}" if ports else "free ports"
    sharing = ", in turns with the training ranks on their GPUs" if r.colocated else ""
    plan.add("rollouts", f"{r.engines} SGLang server(s) of TP {r.tensor_parallel} on every node, {on}{sharing}")
    if ports and ports[-1] > 65535:
        plan.refusals.append(f"rollout.servers.port = {r.port} leaves no ports for {r.engines} servers")
        ports = []
    if ports:
        try:
            choose_ports(r.host, r.port, r.engines)
        except BadArgument as error:
            plan.refusals.append(str(error))
    if r.max_total_tokens and r.max_total_tokens < longest + UNUSED_TOKENS:
        plan.refusals.append(
            f"rollout.servers.max_total_tokens = {r.max_total_tokens:,} is too few for one longest response with its "
            f"prompt; raise it to {longest + UNUSED_TOKENS:,} or more"
        )
        return
    if gpu_memory is None:
        return
    b, tensor = getattr(torch, config.model.dtype).itemsize, r.tensor_parallel
    weights = arch.num_parameters * b // tensor
    token = arch.kv_cache_bytes(b, tensor)
    share = r.args.get("mem_fraction_static", SERVER_SHARE)
    held = int(max(0, share * gpu_memory - weights) // token)
    held = min(held, r.max_total_tokens or held)
    plan.add("", f"weights {readable(weights)} a GPU; the KV cache holds about {held:,} tokens of {readable(token)}, "
                 f"{held // longest} responses of full length")  # fmt: skip
    if held < longest:
        plan.refusals.append(
            f"a server of rollout.servers.tensor_parallel = {tensor} has room for {held:,} tokens beside the weights, "
            f"less than the {longest:,} of one longest response; raise it"
        )


def checkpoint_bytes(config: Config, arch: Architecture) -> int:
    """Return the bytes of a training checkpoint: weights, Adam's moments, the optimizer's fp32 weights, teacher.

    With adapters it holds those alone.
    """
    b = getattr(torch, config.model.dtype).itemsize
    main = 4 if b < 4 or config.parallel.distributed_optimizer else 0
    teacher = {"ema": 4, "snapshot": b}.get(config.teacher.weights, 0) if needs_teacher(config.objective) else 0
    return trained_parameters(arch, configured_spec(config.lora)) * (b + 8 + main + teacher)


def _add_disk(plan: Plan, config: Config, arch: Architecture) -> None:
    """Add the bytes that the run writes and the free bytes; a refusal if these are too few."""
    b = getattr(torch, config.model.dtype).itemsize
    model, adapter = arch.num_parameters * b, trained_parameters(arch, configured_spec(config.lora)) * b
    exports = {"final model": model} if config.lora.exports_model else {}
    if config.lora.exports_adapter:
        exports["adapter" if exports else "final adapter"] = adapter
    one_checkpoint = checkpoint_bytes(config, arch)
    every, count = config.checkpoint.every, 0
    if every:  # at most at once: the newest `keep`, the best one if there is an evaluation, and the one being written
        count = min(config.checkpoint.keep + 1 + bool(config.data.evaluation), math.ceil(config.steps / every))
    needed = sum(exports.values()) + count * one_checkpoint
    parts = [f"{name} {readable(size)}" for name, size in exports.items()]
    parts += [f"{count} checkpoints of {readable(one_checkpoint)}"] if count else []
    if config.rollout.sync.transport == "disk" and needs_rollouts(config.objective) and not config.debug:
        sent = adapter if config.lora.enabled and config.rollout.sync.lora == "adapter" else model
        needed += sent
        parts.append(f"weight sync {readable(sent)}")
    free = free_bytes(config.output)
    plan.add("output", str(config.output), f"  {' + '.join(parts)}; {readable(free)} free")
    if not count:
        plan.add("", f"  a run that is stopped leaves a checkpoint of {readable(one_checkpoint)} besides")
    elif config.checkpoint.asynchronous:
        plan.add("", f"  in host memory while a checkpoint is written: {readable(one_checkpoint)} over all ranks")
    if needed > free:
        plan.refusals.append(
            f"output = {config.output} needs {readable(needed)} of disk, and {readable(free)} are free"
        )
