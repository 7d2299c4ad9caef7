"""Seconds to push a model's weights into one SGLang server, by every transport in turn, against one copy in memory.

    python -m benchmarks.weight_sync [--layers 4] [--rounds 5] [--gpu] [--lora-rank 64]

With --lora-rank also what a run with adapters sends: merged weights after the first push, and adapters, which go into a
second server, with SGLang's LoRA. The model has Qwen3-0.6B's sizes but for its layers, and random bf16 weights. On a
GPU the first push warms up.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.convert import make_model
from benchmarks.measure import table
from megatron_egrsd.config import ModelConfig, ServersConfig, SyncConfig
from megatron_egrsd.config.lora import TARGETS
from megatron_egrsd.hf.adapter_file import peft_config
from megatron_egrsd.hf.adapters import AdapterSpec, adapted_weights, adapter_shapes
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.rollout.server_command import lora_arguments
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.rollout.weight_sync import WeightSync

TRANSPORTS = "distributed", "ipc", "disk"


def seconds_of_a_copy(tensors: list[torch.Tensor]) -> float:
    """Measure the least that any transport does: read every byte once and write it once."""
    into = [torch.empty_like(t) for t in tensors]
    start = time.monotonic()
    for target, source in zip(into, tensors, strict=True):
        target.copy_(source)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="tensors on the server's own GPU: no NCCL then")
    parser.add_argument("--lora-rank", type=int, default=0)
    arguments = parser.parse_args()
    device = "cuda" if arguments.gpu else "cpu"
    transports = [t for t in TRANSPORTS if t != "distributed" or not arguments.gpu]
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        size = make_model(model, num_hidden_layers=arguments.layers)
        checkpoint = HFCheckpoint(model)
        tensors = [(name, checkpoint[name].to(device)) for name in checkpoint.names()]
        base = ServersConfig(max_total_tokens=1024, max_concurrent_requests=4)
        syncs, pushed = {}, {}
        with contextlib.ExitStack() as stack:
            servers = stack.enter_context(RolloutServers(base, ModelConfig(str(model)), 0, Path(scratch, "logs")))
            for name in transports:
                config = SyncConfig(transport=name, bucket_mib=256)
                syncs[name], pushed[name] = WeightSync(servers, config, device, Path(scratch)), tensors
            if arguments.lora_rank:
                spec = AdapterSpec(arguments.lora_rank, 2 * arguments.lora_rank, TARGETS)
                adapted = adapted_weights(checkpoint.architecture, spec)
                syncs["ipc, merged"], pushed["ipc, merged"] = syncs["ipc"], [t for t in tensors if t[0] in adapted]
                lora = replace(base, args=lora_arguments(spec.rank, spec.targets, device))
                logs = Path(scratch, "lora-logs")
                servers = stack.enter_context(RolloutServers(lora, ModelConfig(str(model)), 0, logs))
                shapes = adapter_shapes(checkpoint.architecture, spec)
                adapter = [(n, torch.randn(s).to(device, torch.bfloat16)) for n, s in shapes.items()]
                for name in ("ipc", "disk"):
                    config, peft = SyncConfig(transport=name, bucket_mib=256), peft_config(spec, model)
                    syncs[f"{name}, adapter"] = WeightSync(servers, config, device, Path(scratch), peft)
                    pushed[f"{name}, adapter"] = adapter
            seconds: dict[str, list[float]] = {name: [] for name in ("copy", *syncs)}
            versions = itertools.count(1)
            for _ in range(arguments.rounds + 1):
                seconds["copy"].append(seconds_of_a_copy([tensor for _, tensor in tensors]))
                for name, sync in syncs.items():
                    seconds[name].append(sync.push(iter(pushed[name]), next(versions)))
            syncs["ipc"].verify(iter(tensors))
            for sync in syncs.values():
                sync.close()
    sizes = {name: sum(t.nbytes for _, t in pushed.get(name, tensors)) for name in seconds}
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"{size / 1e9:.2f} GB in {len(tensors)} tensors, median of {arguments.rounds} pushes each, in turn\n")
    rows = (
        [
            name,
            f"{sizes[name] / 1e6:.0f}",
            f"{value:.2f}",
            f"{sizes[name] / value / 1e9:.2f}",
            f"{value / medians['copy']:.1f}",
        ]
        for name, value in medians.items()
    )
    print(table(["transport", "MB", "s", "GB/s", "times a copy"], rows))


if __name__ == "__main__":
    main()
