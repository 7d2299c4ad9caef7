"""How long a step takes: sampling, scoring, training and weight sync, from sizes and a machine's constants.

Floating-point operations are those of hf/operations.py, bytes of a collective those of the ring algorithms. Within a
phase nothing overlaps; `step_seconds` puts the phases together. docs/measurements/scaling.md derives and discusses it.
"""

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.hf.adapters import AdapterSpec, adapted_weights
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import hf_shapes
from megatron_egrsd.hf.operations import forward_flops, head_flops, layer_parameters, training_flops
from megatron_egrsd.planning.machines import Machine


@dataclass(frozen=True)
class Batch:
    """One step's rollouts, in tokens: the student's and the teacher's prompt, and each response."""

    student_prompt: int
    teacher_prompt: int
    responses: Sequence[int]


def step_seconds(generate, score, train, sync, *, staleness: int, slowdown: tuple[float, float] = (1.0, 1.0)):
    """Return the seconds of a step from its phases' seconds, each a number or an array [steps].

    On-policy, one phase follows the other. With `rollout.staleness` 1 the next batch is sampled, in `generate`, while
    this one is scored and trained. `slowdown` is how many times as long sampling, and training, take while the other
    runs as well: 1 on processors of their own, both 2 on one that they share.
    """
    learn = score + train
    if not staleness:
        return generate + learn + sync
    sampling, training = slowdown
    # The longer of the two, side by side, goes on alone, at full speed, when the other is done.
    longer = np.where(
        sampling * generate >= training * learn,
        generate + training * learn * (1 - 1 / sampling),
        learn + sampling * generate * (1 - 1 / training),
    )
    return longer + sync


def pass_seconds(
    machine: Machine, arch: Architecture, parallel: ParallelConfig, ranks: int, lengths: Sequence[int], rows: int, *,
    train: bool, lora: AdapterSpec | None = None,
) -> float:  # fmt: skip
    """Return the seconds of scoring or training `lengths` on `ranks`, without gradient reduction and optimizer.

    `lora`: the adapters that are trained; None if all weights are. The pipeline's bubble is (P - 1) / (M V); each of
    the V chunks of a stage has its fixed cost a micro-batch and sends its rows on.
    """
    own = sum(lengths) * parallel.model_parallel / ranks / parallel.context  # tokens of a rank
    # The other stages wait for the one with most layers.
    most = max(sum(parallel.layers_of_stage(arch.num_layers, stage)) for stage in range(parallel.pipeline))
    factor = 3 + parallel.recompute if train else 1  # passes
    flops = (
        training_flops(arch, lengths, rows, recompute=parallel.recompute, lora=lora)
        if train
        else forward_flops(arch, lengths) + head_flops(arch, rows)
    )
    micro_batches = max(1, math.ceil(own / parallel.max_tokens_per_microbatch))
    micro_batches = math.ceil(micro_batches / parallel.round_of_micro_batches) * parallel.round_of_micro_batches
    chunk_passes = parallel.virtual_pipeline * (2 if train else 1)
    uneven = most * parallel.pipeline / arch.num_layers
    seconds = flops / ranks / machine.flops * uneven + micro_batches * machine.pass_seconds * chunk_passes
    if parallel.pipeline > 1:
        seconds += chunk_passes * own * arch.hidden_size * 2 / parallel.tensor / machine.network
    # Sequence parallelism, a layer: two all-gathers and two reduce-scatters forward, the same and two more gathers (of
    # the inputs, for the weights' gradients, adapters' among them) backward. One product of T x H activations each.
    collectives = ((10 + (4 if parallel.recompute else 0)) if train else 4) if parallel.tensor > 1 else 0
    moved = own * arch.hidden_size * 2 * most
    seconds += collectives * moved * (parallel.tensor - 1) / parallel.tensor / machine.link
    if parallel.context > 1:  # the other ranks' keys and values go round, backward with their gradients
        width = 2 * arch.num_kv_heads * arch.head_dim * 2 / parallel.tensor
        rounds = factor * (parallel.context - 1) * most
        seconds += rounds * own * width / machine.rate(parallel.tensor * parallel.context)
    if parallel.expert > 1:  # dispatch and combine, forward and backward
        rate = machine.rate(parallel.expert)
        passes = factor - (1 if train and parallel.recompute else 0)
        local = moved / parallel.tensor
        seconds += 2 * passes * arch.experts_per_token * local * (parallel.expert - 1) / parallel.expert / rate
    return seconds * (1 + (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline))


def update_seconds(machine: Machine, parallel: ParallelConfig, ranks: int, parameters: int) -> float:
    """Return the seconds of the gradient reduction and of Adam on a rank with `parameters` weights.

    Distributed optimizer: reduce-scatter of fp32 gradients, all-gather of bf16 weights; else one all-reduce. Adam reads
    gradient, weight and two moments and writes the latter three and the bf16 weight: 30 bytes.
    """
    replicas = ranks // (parallel.tensor * parallel.pipeline)  # of a weight: context parallelism splits none
    sharded, rate = parallel.distributed_optimizer, machine.rate(ranks)
    moved = (4 + 2 if sharded else 2 * 4) * parameters * (replicas - 1) / replicas
    return moved / rate + 30 * parameters / (replicas if sharded else 1) / machine.memory_rate


def turn_seconds(machine: Machine, kept: int) -> float:
    """Return the seconds a step that colocated ranks move the `kept` bytes of each to host memory and back.

    These are weights, optimizer and teacher; gradients are dropped. SGLang's unmapping and mapping counts as free.
    """
    return 2 * kept / machine.host


def decode_step_seconds(machine: Machine, arch: Architecture, tensor: int, running: int, context: float) -> float:
    """Return the seconds of a decoding step of `running` sequences of `context` tokens on average, on `tensor` GPUs.

    The weights are read once (of a mixture, the experts that `running` tokens choose), the KV cache of every sequence
    too; or the matrix products take longer.
    """
    used, held = layer_parameters(arch)
    every: float = held
    if arch.num_experts:
        expert = (every - used) / (arch.num_experts - arch.experts_per_token)
        share = 1 - (1 - arch.experts_per_token / arch.num_experts) ** running
        every = every - expert * arch.num_experts * (1 - share)
    head = arch.vocab_size * arch.hidden_size
    cache = arch.kv_cache_bytes(2) * context * running
    read = (2 * (every + head) + cache) / machine.memory_rate
    computed = 2 * (used + head) * running / machine.flops
    exchanged = 0.0
    if tensor > 1:  # two all-reduces a layer; small ones are latency: about 10 us each
        exchanged = 2 * arch.num_layers * (10e-6 + 2 * running * arch.hidden_size * 2 / machine.link)
    return max(read, computed) / tensor + exchanged + machine.decode_seconds


def generate_seconds(step, responses: Sequence[int], prompt: int, slots: int) -> float:
    """Return the seconds until one engine has sampled `responses` (lengths in tokens), at most `slots` at a time.

    step(running, context) -> seconds of a decoding step. Sequences start in order as soon as there is a slot; between
    two ends the number running does not change, so the time is a sum over ends.
    """
    waiting = list(reversed(responses))
    running: list[tuple[int, int]] = []  # (end, start) of each, in decoding steps
    now, seconds, starts = 0, 0.0, 0
    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, (now + waiting.pop(), now))
            starts += now
        end, count = running[0][0], len(running)
        context = prompt + (now + end) / 2 - starts / count
        seconds += (end - now) * step(count, context)
        now = end
        while running and running[0][0] == now:
            starts -= heapq.heappop(running)[1]
    return seconds


@functools.cache
def _synchronised(arch: Architecture, lora: AdapterSpec | None) -> tuple[int, int]:
    """Return the number of weights that a sync sends, and their parameters."""
    shapes = hf_shapes(arch)
    names = adapted_weights(arch, lora) if lora else shapes
    return len(names), sum(math.prod(shapes[name]) for name in names)


def sync_seconds(
    machine: Machine, arch: Architecture, parallel: ParallelConfig, bucket_bytes: int, lora: AdapterSpec | None = None
) -> float:
    """Return the seconds of moving all weights, or those that have an adapter, over rank 0 and into the servers.

    Gathered over TP within the node, sent to the first stage, broadcast in buckets; each part waits for the one before.
    """
    tensors, parameters = _synchronised(arch, lora)
    size = 2 * parameters
    gathered = size * (parallel.tensor - 1) / parallel.tensor / machine.link
    sent = size * (parallel.pipeline - 1) / parallel.pipeline / machine.network
    buckets = math.ceil(size / bucket_bytes)
    return (
        gathered + sent + size / machine.network + tensors * machine.tensor_seconds + buckets * machine.bucket_seconds
    )
