"""The arguments that SGLang is launched with."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_egrsd.config import ModelConfig, RolloutConfig, ServersConfig
from megatron_egrsd.errors import BadArgument

if TYPE_CHECKING:
    from megatron_egrsd.hf.architecture import Architecture


def check_served_model(arch: "Architecture") -> None:
    """Raise BadArgument if SGLang would read the model and answer with something else."""
    if arch.num_experts and arch.tied_embeddings:
        raise BadArgument(
            "the model has experts and ties its embeddings, which SGLang ignores: it would answer with random tokens; "
            "write the embedding as lm_head.weight too and set tie_word_embeddings false in config.json"
        )


def check_served_adapters(targets: Sequence[str]) -> None:
    """Raise BadArgument if SGLang cannot serve adapters on the projections `targets`."""
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if len({*fused} & {*targets}) not in (0, len(fused)):
            raise BadArgument(
                f"SGLang serves adapters on all of {', '.join(fused)} or on none; change lora.targets, or set "
                "rollout.sync.lora to merged"
            )


def lora_arguments(rank: int, targets: Sequence[str], device: str) -> dict[str, Any]:
    """Return the arguments of a server that gets adapters of `rank` on the projections `targets`, one at a time."""
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "lora_target_modules": list(targets),
        "max_loras_per_batch": 1,
    } | ({"lora_backend": "torch_native"} if device == "cpu" else {})


def with_arguments(config: RolloutConfig, **arguments: Any) -> ServersConfig:
    """Return `rollout.servers` with these arguments and those that routing replay needs; the user's own win."""
    if config.routing_replay:
        arguments["enable_return_routed_experts"] = True
    return replace(config.servers, args=arguments | config.servers.args)


def first_gpu(config: ServersConfig, ranks: int, count: int) -> int:
    """Return the GPU at which a node's servers begin: the user's, or the first behind those of its `ranks` ranks.

    It is 0 if the `count` GPUs of the node do not suffice for both, or if ranks and servers take turns (colocated).
    """
    if "base_gpu_id" in config.args:
        return config.args["base_gpu_id"]
    apart = not config.colocated and ranks + config.engines * config.tensor_parallel <= count
    return ranks if apart else 0


def server_command(config: ServersConfig, model: ModelConfig, seed: int, port: int, device: str) -> list[str]:
    """Return SGLang's arguments. `config.args` overrides all others."""
    arguments = {
        "model-path": model.path,
        "host": config.host,
        "port": port,
        "dtype": model.dtype,
        "tp-size": config.tensor_parallel,
        "random-seed": seed,
        "weight-version": "0",
        "skip-server-warmup": True,  # its English sentence kills the server if the vocabulary lacks such words
        "skip-tokenizer-init": True,  # token ids in, token ids out
        "enable-fp32-lm-head": model.dtype != "float32",  # like the engine: rounded logits differ most from it
        "log-level": "info",
        "log-level-http": "warning",  # no line for every request
    }
    if config.max_total_tokens:
        arguments["max-total-tokens"] = config.max_total_tokens
    if device == "cpu":
        arguments |= {
            "device": "cpu",
            "sampling-backend": "pytorch",
            "disable-cuda-graph": True,
            "sleep-on-idle": True,  # the scheduler polls: on few cores it would take a core from training
            "max-running-requests": config.max_concurrent_requests,
        }
    elif config.colocated:
        arguments["enable-memory-saver"] = True  # required by release_memory_occupation
    arguments |= {name.replace("_", "-"): value for name, value in config.args.items()}
    if device == "cpu":
        arguments.pop("base-gpu-id", None)  # SGLang would use it as a NUMA node
    words = []
    for name, value in arguments.items():
        if value is False or value is None:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return words
