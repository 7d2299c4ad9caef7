"""The checks of a run before any process starts."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from megatron_egrsd.config import Config, WandbConfig
from megatron_egrsd.data.prompt_builder import prompt_builder
from megatron_egrsd.data.prompts import load_prompts
from megatron_egrsd.data.samples import Prompt
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapter_file import AdapterFile, configured_spec
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.objectives.load import check_objective, load_objective, needs_rollouts, needs_teacher_prompts
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.rewards.reward import check_math_verify, load_reward
from megatron_egrsd.rollout.generation import NO_ROUTE
from megatron_egrsd.rollout.server_command import check_served_adapters, check_served_model, first_gpu
from megatron_egrsd.system import torchrun
from megatron_egrsd.system.files import check_outside, check_writable, is_empty


def prepare(config: Config, ranks: int | None = None) -> tuple[list[Prompt], list[Prompt], AutoTokenizer]:
    """Check a run, and return its training prompts, held-out prompts and tokenizer.

    `ranks` are the training ranks of a plan for another machine; default: torchrun's, whose nodes and GPUs are checked
    too. Raises BadArgument if something cannot work; nothing has been started or written then.
    """
    arch = Architecture.from_pretrained(config.model.path)
    arch.check_parallel(config.parallel)
    if spec := configured_spec(config.lora):
        spec.check(arch, config.parallel.tensor)
        if config.rollout.sync.lora == "adapter":
            check_served_adapters(spec.targets)
    if config.lora.init:
        AdapterFile(config.lora.init, arch)  # refuses what is none of this model's
    world_size = ranks or torchrun.world_size()
    _check_processes(config, world_size)
    _check_resume(config)
    config.check_world(world_size)
    check_objective(config.objective)
    _check_groups(config)
    if needs_rollouts(config.objective) and config.debug != "train-only":
        check_served_model(arch)
    if ranks is None and torchrun.local_world_size() < world_size:
        _check_nodes(config)
    if ranks is None and torch.cuda.is_available():
        _check_gpus(config, torchrun.local_world_size(), torch.cuda.device_count())
    _check_routing(config, arch)
    _check_contexts(config)
    _check_solutions(config)
    _check_wandb(config.logging.wandb)
    output, model = Path(config.output), Path(config.model.path)
    check_writable(output, "output")
    check_outside(output, "output", model, "model.path")
    check_outside(model, "model.path", output / "hf", "the exported model of output")
    if output.exists() and not is_empty(output) and not config.checkpoint.resume:
        raise BadArgument(
            f"output = {output} exists and is not an empty directory; choose another one, remove it, or continue its "
            "run with --resume auto"
        )
    if config.replay and not Path(config.replay).exists():
        raise BadArgument(f"replay is {config.replay}, which does not exist; give a file or directory of rollouts")
    load_reward(config.data.reward)  # refuses what is no function
    builder = prompt_builder(config)
    solutions = None if needs_rollouts(config.objective) else Solutions(builder, config)
    privileged = needs_teacher_prompts(config)
    train = load_prompts(config.data.train, builder, privileged=privileged, solutions=solutions)
    heldout = load_prompts(config.data.evaluation, builder, privileged=False) if config.data.evaluation else []
    return train, heldout, builder.tokenizer


def _check_processes(config: Config, ranks: int) -> None:
    """Raise BadArgument if debug rollout-only has several ranks or parallel sizes above 1."""
    if config.debug == "rollout-only" and max(ranks, config.parallel.model_parallel) > 1:
        raise BadArgument("debug rollout-only starts no training engine; run it without torchrun and parallel sizes")


def _check_resume(config: Config) -> None:
    """Raise BadArgument if a run is to continue that saves no checkpoints, and would end at the rollouts it finds."""
    if config.debug == "rollout-only" and config.checkpoint.resume:
        raise BadArgument(
            "debug rollout-only saves no checkpoints to continue from; take out checkpoint.resume, and choose another "
            "output"
        )


def _check_nodes(config: Config) -> None:
    """Raise BadArgument if every node is to hand weights to servers that the first one alone knows."""
    servers, sync = config.rollout.servers, config.rollout.sync
    if servers.urls and sync.transport == "ipc" and needs_rollouts(config.objective) and not config.debug:
        raise BadArgument(
            'rollout.sync.transport "ipc" hands weights over within each node, but rollout.servers.urls belong to the '
            'first node alone; set the transport to "distributed" or "disk", or let the run launch the servers'
        )


def _check_gpus(config: Config, ranks: int, count: int) -> None:
    """Raise BadArgument if the node has too few GPUs (`count`) for its ranks or its servers.

    Raise it too if NCCL would join a rank and a server on one GPU.
    """
    if ranks > count and config.debug != "rollout-only":
        raise BadArgument(f"this node has {count} GPU(s), too few for its {ranks} training ranks")
    servers = config.rollout.servers
    if servers.urls or config.debug == "train-only" or not needs_rollouts(config.objective):
        return
    first = first_gpu(servers, ranks, count)
    last = first + servers.engines * servers.tensor_parallel - 1
    if last >= count:
        raise BadArgument(f"the servers need GPUs up to number {last}, counted from 0, and this node has {count}")
    if config.rollout.sync.transport == "distributed" and not config.debug and first < ranks:
        raise BadArgument(
            f"the servers would begin at GPU {first}, which training rank {first} has, and NCCL joins no two processes "
            "on one GPU: leave GPUs to the servers by fewer training ranks, or set rollout.sync.transport to ipc"
        )


def _check_routing(config: Config, arch: Architecture) -> None:
    """Raise BadArgument if a router option is set that the model, the objective or parallel.megatron rules out."""
    if config.optimizer.freeze_router and not arch.num_experts:
        raise BadArgument("optimizer.freeze_router is true, but the model has no experts; set it to false")
    if not config.rollout.routing_replay:
        return
    reason = ""
    if not arch.num_experts:
        reason = "the model has no experts"
    elif arch.num_experts > NO_ROUTE:
        reason = f"the model has {arch.num_experts} experts; routes are kept as bytes, for up to {NO_ROUTE}"
    elif not needs_rollouts(config.objective):
        reason = "the objective trains reference solutions, which nothing has routed"
    elif config.parallel.megatron.get("moe_router_fusion"):
        reason = "parallel.megatron.moe_router_fusion chooses the experts in a kernel that takes none"
    if reason:
        raise BadArgument(f"rollout.routing_replay cannot work: {reason}; set it to false")


def _check_groups(config: Config) -> None:
    """Raise BadArgument if the function's signal compares the rollouts of a prompt, and each has one."""
    objective = config.objective
    if not objective.function or objective.advantage != "group" or config.rollout.rollouts_per_prompt > 1:
        return
    rewards, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 1])
    later = replace(History().after([1.0, 0.0]), steps=1000)
    if not any(load_objective(objective, past).advantages(rewards, groups).any() for past in (History(), later)):
        raise BadArgument(
            'objective.advantage "group" compares the rollouts of one prompt, but rollout.rollouts_per_prompt is 1, so '
            'that every advantage is 0; set it to 2 or more, or the advantage to "running"'
        )


def _check_contexts(config: Config) -> None:
    """Raise BadArgument if the teacher reads a vote that cannot be counted, or one context if several are compared."""
    if config.data.teacher_context == "majority":
        check_math_verify('data.teacher_context is "majority"')
    if load_objective(config.objective).needs_contexts and config.data.teacher_context != "contrast":
        raise BadArgument(
            "the objective compares the teacher after a right rollout with the teacher after wrong ones, but "
            f'data.teacher_context is "{config.data.teacher_context}"; set it to contrast'
        )


def _check_solutions(config: Config) -> None:
    """Raise BadArgument if an objective that trains solutions is to sample, or has several rollouts a prompt."""
    if needs_rollouts(config.objective):
        return
    if config.debug == "rollout-only":
        raise BadArgument("the objective trains reference solutions, so debug rollout-only has nothing to sample")
    if config.rollout.rollouts_per_prompt != 1:
        raise BadArgument(
            "the objective trains the reference solution of each problem, so rollout.rollouts_per_prompt must be 1, "
            f"and is {config.rollout.rollouts_per_prompt}"
        )


def _check_wandb(config: WandbConfig) -> None:
    """Raise BadArgument if the run asks for Weights & Biases, but its package or its key is missing."""
    if not config.project:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a directory wandb/ of earlier runs is a namespace to Python
        raise BadArgument(
            "logging.wandb needs the package wandb, which is not installed: pip install wandb, or leave "
            "logging.wandb.project empty"
        )
    if config.mode == "online":
        import wandb

        if not wandb.api.api_key:
            raise BadArgument(
                'logging.wandb.mode is "online", but there is no key of Weights & Biases: run `wandb login`, set '
                'WANDB_API_KEY, or set the mode to "offline"'
            )
