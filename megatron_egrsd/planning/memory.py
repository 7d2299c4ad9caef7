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
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_entries, adapter_shapes
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import entries, hf_shapes
from megatron_egrsd.planning.activations import (
    Placement,
    adapter_activations,
    divergence_head,
    frozen_inputs,
    frozen_norms,
    layer_activations,
    layer_gradients,
    lm_head,
    norm,
)

# CUDA context, cuBLAS workspaces, NCCL channels and the allocator's fragmentation. Assumed; no GPU has been measured.
GPU_RUNTIME_BYTES = 4 << 30
SERVER_SHARE = 0.88  # of a GPU's memory that SGLang takes for weights and KV cache: about its default


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
    """Sizes that the last stage holds for a divergence from the teacher, from its pass to the end of the step.

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
    scored_tokens: int = 0,
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
        scored_tokens: Tokens on a rank of the teacher's longest micro-batch, if its sequences are longer than `tokens`.
        needs_reference: Whether the initial weights are kept, for a KL penalty.
        lora: The adapters that are trained; None if all weights are.
        held: The sizes held for a divergence from the teacher; None if the objective asks for none.
    """
    rank = _Rank(arch, parallel, world_size, stage, place, tokens, itemsize, lora)
    resident = rank.resident(teacher, needs_teacher, needs_reference)
    phases = rank.training_phases(teacher, held)
    if needs_teacher:
        cast = teacher.weights == "ema" and itemsize < 4
        # A layer's activations for a backward pass: without one, parts are freed before the layer ends.
        phases["scoring by the teacher"] = {"one layer, at most": max(tokens, scored_tokens) * rank.layer} | (
            {"teacher in the type of the weights": _numel(rank.trained) * itemsize} if cast else {}
        )
    if held and rank.is_last:
        states = rank.held_states(held)
        phases = {name: terms | states for name, terms in phases.items()}
    if rank.number == 0:
        largest = arch.padded_vocab_size(parallel.tensor) * arch.hidden_size * itemsize
        bucket = min(bucket_bytes, arch.num_parameters * itemsize)
        phases["weight sync"] = {"a bucket's tensors and the next one": bucket + largest,
                                 "flat copy": max(bucket, largest)}  # fmt: skip
    return RankMemory(rank.number, stage, resident, phases)


@dataclass(frozen=True)
class _Rank:
    """The terms of `rank_memory`, whose arguments these are."""

    arch: Architecture
    parallel: ParallelConfig
    world_size: int
    stage: int
    place: Placement
    tokens: int
    b: int
    lora: AdapterSpec | None

    @property
    def number(self) -> int:
        """The first global rank of the stage."""
        return self.stage * (self.world_size // self.parallel.pipeline)

    @property
    def is_last(self) -> bool:
        return self.stage == self.parallel.pipeline - 1

    @property
    def h(self) -> int:
        """Columns of a hidden state between the layers' tensor-parallel parts."""
        return self.arch.hidden_size // (self.parallel.tensor if self.parallel.sequence_parallel else 1)

    @functools.cached_property
    def chunks(self) -> list[dict[str, torch.Size]]:
        return shard_shapes(self.arch, self.parallel, self.stage)

    @functools.cached_property
    def trained(self) -> list[dict[str, torch.Size]]:
        return adapter_shards(self.arch, self.parallel, self.stage, self.lora) if self.lora else self.chunks

    @functools.cached_property
    def layer(self) -> int:
        """Bytes a token that a layer keeps from forward to backward."""
        tensor, b = self.parallel.tensor, self.b
        layer = layer_activations(self.arch, tensor, self.h, b, self.place, self.parallel.context)
        if self.lora:
            layer += adapter_activations(self.parallel, b, self.lora)
            layer -= frozen_norms(self.arch, tensor, self.h, b, self.place)
            layer -= frozen_inputs(self.arch, tensor, self.h, b, self.lora)
        return layer

    def resident(self, teacher: TeacherConfig, needs_teacher: bool, needs_reference: bool) -> dict[str, int]:
        """Return weights, gradients, optimizer, the teacher's weights and the initial ones."""
        frozen, stage_ranks = _numel(self.chunks) * self.b, self.world_size // self.parallel.pipeline
        resident = {"frozen weights": frozen} if self.lora else {}
        resident |= _trained(self.trained, self.parallel, stage_ranks, self.b, "adapters" if self.lora else "weights")
        # With adapters the frozen teacher and the initial weights are the frozen weights themselves.
        if needs_teacher and teacher.weights != "live" and not (self.lora and teacher.weights == "frozen"):
            itemsize = 4 if teacher.weights == "ema" else self.b
            resident[f"teacher ({teacher.weights})"] = _numel(self.trained) * itemsize
        if needs_reference and not self.lora and "teacher (frozen)" not in resident:
            resident["initial weights (KL)"] = frozen
        if self.place.gpu:
            resident["CUDA runtime"] = GPU_RUNTIME_BYTES
        return resident

    def activations(self) -> dict[str, int]:
        """Return what the layers keep of the micro-batches in flight."""
        parallel, in_flight = self.parallel, self.parallel.pipeline - self.stage  # 1F1B: forward passes of a stage
        if parallel.interleaved:  # counted in chunks: megatron-core's warm-up and one more
            in_flight = 2 * (in_flight - 1) + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
        layers = max(parallel.layers_of_stage(self.arch.num_layers, self.stage))
        hidden = self.h * self.b
        kept = layers * (hidden if parallel.recompute else self.layer) + (0 if self.is_last else hidden)
        activations = {"activations": in_flight * self.tokens * kept}
        if self.lora and not parallel.recompute:
            activations["adapters: A of fused projections"] = in_flight * sum(
                math.prod(shape) * self.b
                for name, shape in max(self.trained, key=len).items()
                if name.endswith("lora_A")
            )
        return activations

    def training_phases(self, teacher: TeacherConfig, held: HeldTeacher | None) -> dict[str, dict[str, int]]:
        """Return what the passes of an update add, and its optimizer step."""
        arch, parallel, b, tokens = self.arch, self.parallel, self.b, self.tokens
        activations = self.activations()
        backward = {"gradients of activations": tokens * layer_gradients(arch, parallel.tensor, self.h, b)}
        if parallel.recompute:
            backward["recomputed layer"] = tokens * (self.layer - self.h * b)
        phases = {"backward pass of the layers": activations | backward}
        if self.is_last:
            head, reading = self._head(teacher, held)
            phases["backward pass of the LM head"] = activations | head
            phases["forward pass of the LM head"] = activations | reading
        replicas = self.world_size // (parallel.tensor * parallel.pipeline)  # of a weight: CP splits none
        phases["optimizer step"] = {"temporaries": _adam_temporaries(self.trained, parallel, replicas, self.place)}
        return phases

    def _head(self, teacher: TeacherConfig, held: HeldTeacher | None) -> tuple[dict[str, int], dict[str, int]]:
        """Return what the backward pass of the final norm and the LM head adds, and its forward pass."""
        arch, b, tokens, place, frozen = self.arch, self.b, self.tokens, self.place, self.lora is not None
        tensor, reading = self.parallel.tensor, {}
        head = lm_head(arch, tensor, tokens, b, place, frozen=frozen)
        if held:
            shared = frozen or (teacher.weights == "live" and not held.copies_weight)
            both = divergence_head(arch, tensor, tokens, b, place, shared=shared, frozen=frozen)
            if held.top_k:
                k = min(held.top_k, arch.vocab_size)
                both["divergence: top k"] = tokens * k * _TOP_K_BACKWARD
                chunk = both["divergence: logits kept and one chunk"]
                reading = {"divergence: top k": max(chunk + tokens * k * _TOP_K_READING, tokens * k * _TOP_K_VALUE)}
            head = head | both if held.log_prob_grad else both
        kept = norm(self.h, b, place) - (self.h * b if frozen and not place.transformer_engine else 0)
        gathered = arch.hidden_size * b if self.parallel.sequence_parallel else 0
        return head | {"final norm": tokens * (kept + gathered)}, reading

    def held_states(self, held: HeldTeacher) -> dict[str, int]:
        """Return what the last stage holds of the teacher for a divergence, through all phases."""
        states = {"teacher's hidden states": held.tokens * self.arch.hidden_size * self.b}
        if held.copies_weight:
            columns = self.arch.padded_vocab_size(self.parallel.tensor) // self.parallel.tensor
            states["teacher's LM head"] = columns * self.arch.hidden_size * self.b
        return states


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
