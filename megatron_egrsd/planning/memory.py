"""Bytes that one training rank allocates, term by term, for the report and the check of a dry run. Arithmetic only.

The resident bytes (weights, gradients, optimizer, teacher) follow the buffers of megatron-core 0.19.2 exactly; the
bytes of a step follow the tensors that autograd keeps. tests/parallel/test_memory.py compares both with the engine on
CPU. Transformer Engine's layers are counted from its source and have not been measured.

With adapters (LoRA) the weights are frozen: only adapters have gradients, optimizer and, as a teacher, copies.

Symbols: T tokens of a micro-batch on one rank, all of which may be response tokens; b bytes of a weight; H, F, D, N, G,
V as in hf/mapping.py.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch

from megatron_egrsd.config import ParallelConfig, TeacherConfig
from megatron_egrsd.hf.adapters import ROW_PARALLEL, AdapterSpec, adapter_entries, adapter_shapes
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import entries, hf_shapes
from megatron_egrsd.vocab_parallel.linear import chunk_plan

# CUDA context, cuBLAS workspaces, NCCL channels and the allocator's fragmentation. Assumed; no GPU has been measured.
GPU_RUNTIME_BYTES = 4 << 30
SERVER_SHARE = 0.88  # of a GPU's memory that SGLang takes for weights and KV cache: about its default


@dataclass(frozen=True)
class Placement:
    """The device and layers of the engine. They determine the kernels and thereby the tensors that exist."""

    gpu: bool
    transformer_engine: bool

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank: resident through the run, and added by each phase of a step.

    `rank` is the first global rank of pipeline stage `stage`.
    """

    rank: int
    stage: int
    resident: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def kept(self) -> int:
        """Bytes offloaded to host memory while colocated servers sample: gradients are dropped, the runtime stays."""
        return sum(size for name, size in self.resident.items() if name not in ("gradients (fp32)", "CUDA runtime"))

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + sum(self.phases[self.peak_phase].values())


# Bytes a token and column of linear_divergence with top_k. Beside a chunk of logits: its coefficients and the places in
# the chunk, and parts that are merged. Without a chunk: the value in fp64 with its gradient.
_TOP_K_BACKWARD, _TOP_K_READING, _TOP_K_VALUE = 33, 100, 131


@dataclass(frozen=True)
class HeldTeacher:
    """What a divergence from the teacher holds on the last stage from the teacher's pass to the end of the step.

    Args:
        tokens: Response tokens of the rollouts of a rank, whose hidden states are held.
        copies_weight: Whether the teacher's LM head is a copy of its own: it was cast, or would change between updates.
        log_prob_grad: Whether the objective has a policy loss besides.
        top_k: The columns that are compared one by one; None for all.
    """

    tokens: int
    copies_weight: bool
    log_prob_grad: bool
    top_k: int | None = None


def shard_shapes(arch: Architecture, parallel: ParallelConfig, stage: int) -> list[dict[str, torch.Size]]:
    """Return {local name (layers from 0): shape} of every parameter of a rank of `stage`, one dict per chunk.

    The last stage of a tied model holds a copy of the embedding; EP splits only the experts.
    """
    template = _one_layer(arch, parallel.tensor, parallel.expert)
    layer = "decoder.layers.0."
    own = [(name.removeprefix(layer), shape) for name, shape in template.items() if name.startswith(layer)]
    chunks = [
        {f"decoder.layers.{i}.{name}": shape for i in range(layers) for name, shape in own}
        for layers in parallel.layers_of_stage(arch.num_layers, stage)
    ]
    if stage == 0:
        chunks[0]["embedding.word_embeddings.weight"] = template["embedding.word_embeddings.weight"]
    if stage == parallel.pipeline - 1:
        chunks[-1]["decoder.final_layernorm.weight"] = template["decoder.final_layernorm.weight"]
        if not arch.tied_embeddings:
            chunks[-1]["output_layer.weight"] = template["output_layer.weight"]
        elif stage > 0:
            chunks[-1]["output_layer.weight"] = template["embedding.word_embeddings.weight"]
    return chunks


@functools.cache
def _one_layer(arch: Architecture, tensor: int, expert: int) -> dict[str, torch.Size]:
    """Return the shapes of a rank's shard for a model of one layer, from the mapping of the weights (hf/mapping.py)."""
    arch = replace(arch, num_layers=1)
    hf, shapes = hf_shapes(arch), {}
    for entry in entries(replace(arch, num_experts=arch.num_experts // expert)):
        full = entry.layout.join([torch.empty(hf[name], device="meta") for name in entry.hf], arch, tensor)
        shapes[entry.megatron] = entry.layout.shard(full, 0, 1 if entry.is_expert else tensor).shape
    return shapes


def adapter_shards(
    arch: Architecture, parallel: ParallelConfig, stage: int, spec: AdapterSpec
) -> list[dict[str, torch.Size]]:
    """Return {local name (layers from 0): shape} of every adapter tensor of a rank of `stage`, one dict per chunk."""
    template, first = _one_layer_of_adapters(arch, parallel.tensor, spec), "decoder.layers.0."
    return [
        {name.replace(first, f"decoder.layers.{i}."): shape for i in range(layers) for name, shape in template.items()}
        for layers in parallel.layers_of_stage(arch.num_layers, stage)
    ]


@functools.cache
def _one_layer_of_adapters(arch: Architecture, tensor: int, spec: AdapterSpec) -> dict[str, torch.Size]:
    """Return the shapes of a rank's shards for a model of one layer, from the table of adapters (hf/adapters.py)."""
    arch = replace(arch, num_layers=1)
    full, shapes = adapter_shapes(arch, spec), {}
    for entry in adapter_entries(arch, spec):
        whole = torch.empty(full[entry.hf[0]], device="meta")
        shapes[entry.megatron] = entry.layout.shard(whole, 0, tensor).shape
    return shapes


def rank_memory(
    arch: Architecture,
    parallel: ParallelConfig,
    world_size: int,
    stage: int,
    place: Placement,
    *,
    tokens: int,
    itemsize: int,
    bucket_bytes: int,
    teacher: TeacherConfig,
    needs_teacher: bool = True,
    needs_reference: bool = False,
    lora: AdapterSpec | None = None,
    held: HeldTeacher | None = None,
) -> RankMemory:
    """Return the bytes of a rank of pipeline stage `stage` for micro-batches of at most `tokens` tokens on a rank.

    Args:
        itemsize: Bytes of a weight.
        bucket_bytes: Size of a bucket of the weight sync.
        teacher: The weights that the teacher scores with, kept if `needs_teacher` and if they are not the current ones.
        needs_reference: Whether the initial weights are kept, for a KL penalty.
        lora: The adapters that are trained; None if all weights are.
        held: What is held for a divergence from the teacher; None if the objective asks for none.
    """
    b = itemsize
    chunks = shard_shapes(arch, parallel, stage)
    trained = adapter_shards(arch, parallel, stage, lora) if lora else chunks
    replicas = world_size // (parallel.tensor * parallel.pipeline)  # of a weight: context parallelism splits none
    resident = {"frozen weights": _numel(chunks) * b} if lora else {}
    resident |= _trained(trained, parallel, world_size // parallel.pipeline, b, "adapters" if lora else "weights")
    # With adapters the frozen teacher and the initial weights are the frozen weights themselves.
    if needs_teacher and teacher.weights != "live" and not (lora and teacher.weights == "frozen"):
        resident[f"teacher ({teacher.weights})"] = _numel(trained) * (4 if teacher.weights == "ema" else b)
    if needs_reference and not lora and "teacher (frozen)" not in resident:
        resident["initial weights (KL)"] = _numel(chunks) * b
    if place.gpu:
        resident["CUDA runtime"] = GPU_RUNTIME_BYTES

    in_flight = parallel.pipeline - stage  # 1F1B: forward passes of a stage before its first backward pass
    if parallel.interleaved:  # counted in chunks: megatron-core's warm-up and one more
        in_flight = 2 * (in_flight - 1) + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
    layers = max(parallel.layers_of_stage(arch.num_layers, stage))
    is_last = stage == parallel.pipeline - 1
    h = arch.hidden_size // (parallel.tensor if parallel.sequence_parallel else 1)
    layer = layer_activations(arch, parallel.tensor, h, b, place, parallel.context)
    if lora:
        layer += adapter_activations(parallel, b, lora) - frozen_norms(arch, parallel.tensor, h, b, place)
    kept = layers * (h * b if parallel.recompute else layer) + (0 if is_last else h * b)
    activations = {"activations": in_flight * tokens * kept}
    if lora and not parallel.recompute:
        activations["adapters: A of fused projections"] = in_flight * sum(
            math.prod(shape) * b for name, shape in max(trained, key=len).items() if name.endswith("lora_A")
        )
    final_norm = _norm(h, b, place) - (h * b if lora and not place.transformer_engine else 0)
    head = lm_head(arch, parallel.tensor, tokens, b, place, frozen=lora is not None)
    states, reading = {}, {}
    if held and is_last:
        states["teacher's hidden states"] = held.tokens * arch.hidden_size * b
        if held.copies_weight:
            columns = arch.padded_vocab_size(parallel.tensor) // parallel.tensor
            states["teacher's LM head"] = columns * arch.hidden_size * b
        shared = lora is not None or (teacher.weights == "live" and not held.copies_weight)
        both = divergence_head(arch, parallel.tensor, tokens, b, place, shared=shared, frozen=lora is not None)
        if held.top_k:
            k = min(held.top_k, arch.vocab_size)
            both["divergence: top k"] = tokens * k * _TOP_K_BACKWARD
            chunk = both["divergence: a chunk of both models' logits"]
            reading = {"divergence: top k": max(chunk + tokens * k * _TOP_K_READING, tokens * k * _TOP_K_VALUE)}
        head = head | both if held.log_prob_grad else both
    head |= {"final norm": tokens * (final_norm + (arch.hidden_size * b if parallel.sequence_parallel else 0))}
    backward = {"gradients of activations": tokens * _layer_gradients(arch, parallel.tensor, h, b, place)}
    if parallel.recompute:
        backward["recomputed layer"] = tokens * (layer - h * b)
    phases = {"backward pass of the layers": activations | backward}
    if is_last:
        phases["backward pass of the LM head"] = activations | head
        phases["forward pass of the LM head"] = activations | reading
    phases["optimizer step"] = {"temporaries": _adam_temporaries(trained, parallel, replicas, place)}
    if teacher.weights == "ema" and b < 4:
        phases["scoring"] = {"teacher in the type of the weights": _numel(trained) * b,
                             "one layer": tokens * layer}  # fmt: skip
    phases = {name: terms | states for name, terms in phases.items()}
    rank = stage * (world_size // parallel.pipeline)
    if rank == 0:
        largest = arch.padded_vocab_size(parallel.tensor) * arch.hidden_size * b
        bucket = min(bucket_bytes, arch.num_parameters * b)
        phases["weight sync"] = {"a bucket's tensors and the next one": bucket + largest,
                                 "flat copy": max(bucket, largest)}  # fmt: skip
    return RankMemory(rank, stage, resident, phases)


def _trained(
    chunks: list[dict[str, torch.Size]], parallel: ParallelConfig, stage_ranks: int, b: int, name: str
) -> dict[str, int]:
    """Return the bytes of the weights that are trained, as `name`, and of their gradients and optimizer state.

    Source: megatron-core's _ParamAndGradBuffer (fp32 gradients, grad_reduce_in_fp32), its Float16 and distributed
    optimizers (an fp32 copy of weights that are not fp32, two fp32 moments).
    """
    weights = gradients = optimizer = 0
    sharded = parallel.distributed_optimizer
    replicas = {False: stage_ranks // parallel.tensor, True: stage_ranks // parallel.expert}
    for shapes, (experts, ranks) in itertools.product(chunks, replicas.items()):
        sizes = [math.prod(s) for name, s in shapes.items() if (".local_experts." in name) == experts]
        buffer = _buffer_numel(sizes, ranks) if sharded else sum(sizes)
        weights += buffer * b
        gradients += buffer * 4
        optimizer += (buffer // ranks if sharded else buffer) * (8 + (4 if b < 4 else 0))
    return {name: weights, "gradients (fp32)": gradients, "optimizer": optimizer}


def _buffer_numel(sizes: list[int], data_parallel: int) -> int:
    """Count the elements of the distributed optimizer's buffer: parameters start on multiples of 64, its end is padded.

    Source: megatron.core.optimizer.param_layout (pad_param_start, pad_bucket_end). A rank owns an equal share, of which
    the padding carries no optimizer state; counting it errs by less than 64 elements a parameter.
    """
    unit = math.lcm(data_parallel, 128)
    aligned = sum(-(-n // 64) * 64 for n in sizes)
    return -(-aligned // unit) * unit


def _numel(chunks: list[dict[str, torch.Size]]) -> int:
    return sum(math.prod(s) for shapes in chunks for s in shapes.values())


def _norm(width: int, b: int, place: Placement) -> int:
    """Return the bytes per token that an RMSNorm of `width` and the next layer keep: input and normalised output."""
    if place.transformer_engine:
        return 2 * b * width + 4
    return 12 * width + 4  # engine/layers.py computes in fp32: fp32 two copies and bf16 two, or fp32 three


def layer_activations(arch: Architecture, tensor: int, h: int, b: int, place: Placement, context: int = 1) -> int:
    """Return the bytes per token that one layer keeps from forward to backward; `h` = H / TP if sequence parallel.

    Derived as in Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1), for RMSNorm, grouped queries, SwiGLU and
    attention that keeps no scores: two norms, queries and keys before their norms and after the rotary embedding,
    values, the attention's output and its log-sum-exp, and the MLP's intermediate results.
    """
    heads, groups = arch.num_heads // tensor, max(1, arch.num_kv_heads // tensor)
    q, kv = heads * arch.head_dim, groups * arch.head_dim
    # Queries before the norm; keys are kept as a view of the whole projection, which ranks that share a head gather.
    shares = tensor > arch.num_kv_heads
    whole = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim if shares else q + 2 * kv
    norms = 2 * _norm(h, b, place)
    normed = arch.family.qk_norm  # else nothing needs queries and keys from before the rotary embedding
    if place.transformer_engine:
        # Without these norms the projection is kept for its values alone.
        attention = b * ((q if normed else 0) + whole) + b * (q + kv) + b * q
    else:
        fp32_inputs = 8 * q + 4 * whole + 4 * kv if b == 4 else 10 * (q + kv)
        # The core attention copies queries, keys, values and output into padded batches (engine/layers.py).
        # Under context parallelism it copies the keys and values of all ranks up to the end of each of the two chunks.
        # The masks, which all layers share, are not counted.
        key = q if place.gpu and b == 4 else kv  # torch's fp32 kernels need a key for every query
        copies = 2 * q + key * (2 * context + 1 if context > 1 else 2)
        attention = (fp32_inputs if normed else 0) + b * copies + b * q
        attention += 4 * arch.head_dim * b  # the unfused rotary embedding keeps cosines and sines, twice
    attention += 4 * heads + (4 * (heads + groups) if normed else 0)
    return norms + attention + _mlp(arch, tensor, h, b, place)


def adapter_activations(parallel: ParallelConfig, b: int, lora: AdapterSpec) -> int:
    """Return the bytes per token that the adapters of one layer keep: A x of each projection.

    Its input x is counted with the layer, which keeps it for an adapter where it would for a gradient of W. Sequence
    parallelism divides A x where it divides the layer's output.
    """
    divided = [name in ROW_PARALLEL and parallel.sequence_parallel for name in lora.targets]
    return sum(b * lora.rank // (parallel.tensor if split else 1) for split in divided)


def frozen_norms(arch: Architecture, tensor: int, h: int, b: int, place: Placement) -> int:
    """Return the bytes per token that the norms of a layer keep for the gradients of their weights alone.

    They are the normalised inputs; Transformer Engine computes them again.
    """
    heads, groups = arch.num_heads // tensor, max(1, arch.num_kv_heads // tensor)
    heads_width = (heads + groups) * arch.head_dim if arch.family.qk_norm else 0
    return 0 if place.transformer_engine else b * (2 * h + heads_width)


def _mlp(arch: Architecture, tensor: int, h: int, b: int, place: Placement) -> int:
    """Return SwiGLU's bytes per token: fc1's output, fc2's input; unfused (CPU) also SiLU's output and linear half."""
    rows = 3 if place.gpu else 5
    if not arch.num_experts:
        return rows * b * arch.intermediate_size // tensor
    # Each token visits k experts: dispatched and returned rows, router probabilities (estimated, not measured).
    k = arch.experts_per_token
    return k * b * (rows * arch.expert_intermediate_size // tensor + 2 * h) + 4 * arch.num_experts


def _layer_gradients(arch: Architecture, tensor: int, h: int, b: int, place: Placement) -> int:
    """Return the bytes per token of the gradients alive at once in a layer's backward pass, at its peak in the MLP."""
    experts = arch.experts_per_token if arch.num_experts else 1
    width = (arch.expert_intermediate_size or arch.intermediate_size) * experts // tensor
    return b * (4 * width + 2 * h)


def lm_head(
    arch: Architecture, tensor: int, tokens: int, b: int, place: Placement, frozen: bool = False
) -> dict[str, int]:
    """Return the bytes of vocab_parallel.linear in the backward pass of `tokens` response rows, by name."""
    columns = arch.padded_vocab_size(tensor) // tensor
    logit = 4 if place.gpu else b
    chunk, kept_chunks = chunk_plan(place.device, tokens, columns, logit)
    kept = min(kept_chunks * chunk, columns)
    buffer = min(chunk, columns - kept)
    cast = chunk * b if logit > b else 0  # the gradient of one chunk, in the type of the weights
    rows = tokens * arch.hidden_size
    head = {
        "LM head: logits kept and one chunk": tokens * ((kept + buffer) * logit + cast),
        "LM head: rows and their gradient": rows * (b + 4 + b),
    }
    return head if frozen else head | {"LM head: gradient of the weight": columns * arch.hidden_size * b}


def divergence_head(
    arch: Architecture, tensor: int, tokens: int, b: int, place: Placement, *, shared: bool, frozen: bool
) -> dict[str, int]:
    """Return the bytes of vocab_parallel.linear_divergence in the backward pass of `tokens` response rows, by name.

    `shared`: one LM head serves both models, whose rows then lie end to end; `frozen`: it is not trained.
    """
    columns = arch.padded_vocab_size(tensor) // tensor
    logit = 4 if place.gpu else b
    chunk, _ = chunk_plan(place.device, 2 * tokens, columns, logit, keep_bytes=0)
    cast = chunk * b if logit > b else 0
    rows = tokens * arch.hidden_size
    head = {
        "divergence: a chunk of both models' logits": tokens * (2 * chunk * logit + cast),
        "divergence: rows and their gradient": rows * (2 * b + (2 * b if shared else 0) + 4 + b),
    }
    return head if frozen else head | {"divergence: gradient of the weight": columns * arch.hidden_size * b}


def _adam_temporaries(
    chunks: list[dict[str, torch.Size]], parallel: ParallelConfig, replicas: int, place: Placement
) -> int:
    """Return the bytes that AdamW allocates: none if fused (Transformer Engine), else torch's square roots.

    torch's AdamW updates all parameters at once on a GPU, and one by one with two temporaries on a CPU.
    """
    owned, largest = _numel(chunks), max(math.prod(s) for shapes in chunks for s in shapes.values())
    if parallel.distributed_optimizer:
        owned = -(-owned // replicas)
    if place.gpu:
        return 0 if place.transformer_engine else 4 * owned
    return 8 * min(owned, largest)
