"""Layouts of up to 512 ranks in one process: torch's fake process group and meta tensors, the real model sizes.

Every distinct rank's shard is built by the engine's own code. Together they are the Hugging Face model, and each is
what megatron_egrsd/planning/memory.py counts. No data moves here; that the layout does not change training is
test_layouts.py.
"""

import itertools
import json
import re

import pytest
import torch
import torch.distributed as dist

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import entries, hf_shapes
from megatron_egrsd.planning.memory import _buffer_numel, shard_shapes
from tests.published import PARAMETERS, PUBLISHED

# model, ranks, TP, PP, VPP, CP, EP: an upper stage of each is uneven in what it holds besides layers.
LAYOUTS = [
    ("Qwen3-8B", 8, 4, 1, 1, 1, 1, []),
    ("Qwen3-8B", 64, 2, 2, 1, 1, 1, []),
    ("Qwen3-8B", 512, 8, 4, 3, 1, 1, []),
    ("Qwen3-8B", 64, 4, 2, 1, 4, 1, []),
    ("Qwen3-4B", 512, 4, 4, 1, 1, 1, []),  # tied embeddings: the last stage has a copy
    ("Qwen3-32B", 64, 8, 2, 1, 1, 1, []),
    ("Qwen3-32B", 512, 8, 8, 2, 1, 1, []),
    pytest.param("Qwen3-30B-A3B", 64, 2, 1, 1, 1, 8, [], marks=pytest.mark.slow),
    ("Qwen3-30B-A3B", 512, 1, 4, 3, 1, 16, []),
    pytest.param("Qwen3-30B-A3B", 64, 4, 2, 1, 2, 16, [], marks=pytest.mark.slow),
    ("Qwen3-8B", 64, 2, 4, 1, 1, 1, [10, 10, 9, 7]),
    ("Qwen3-4B", 16, 1, 2, 2, 1, 1, [10, 10, 9, 7]),
    pytest.param("Qwen3-235B-A22B", 512, 4, 8, 1, 1, 16, [12, 12, 12, 12, 12, 12, 12, 10], marks=pytest.mark.slow),
]


def build_shard(arch: Architecture, world_size: int, rank: int, layout: ParallelConfig):
    """Return (chunks on the meta device, TP rank, EP rank) of one rank of a world that exists only in this process."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_egrsd.engine import distributed
    from megatron_egrsd.engine.model import build_model, transformer_config

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            layout.interleaved,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        replicas = world_size // (layout.tensor * layout.pipeline)
        assert parallel_state.get_data_parallel_world_size(with_context_parallel=True) == replicas
        assert parallel_state.get_data_parallel_world_size() == world_size // layout.model_parallel
        with torch.device("meta"):
            chunks = build_model(arch, transformer_config(arch, layout, torch.bfloat16), layout)
        ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    finally:
        distributed.shutdown()
    assert {p.device.type for chunk in chunks for p in chunk.parameters()} == {"meta"}
    return chunks, *ranks


@pytest.mark.parametrize(
    ("name", "world_size", "tensor", "pipeline", "virtual", "context", "expert", "layers"),
    LAYOUTS,
    ids=lambda value: str(value).replace("Qwen3-", ""),
)
def test_the_shards_of_every_rank_are_the_model(name, world_size, tensor, pipeline, virtual, context, expert, layers):
    arch = Architecture.from_config(PUBLISHED[name])
    layout = ParallelConfig(
        tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, expert=expert,
        sequence_parallel=tensor > 1, pipeline_layout=layers,
    )  # fmt: skip
    # TP and EP both count from a stage's first rank; the ranks after the larger of the two (each 2^n) repeat them.
    distinct = [(stage, i) for stage in range(pipeline) for i in range(max(tensor, expert))]
    last_replica = (pipeline - 1, world_size // pipeline - 1)
    found: dict[str, dict[int, torch.Tensor]] = {}
    counted = [shard_shapes(arch, layout, stage) for stage in range(pipeline)]
    for stage, i in [*distinct, last_replica]:
        rank = stage * (world_size // pipeline) + i
        chunks, tensor_rank, expert_rank = build_shard(arch, world_size, rank, layout)
        assert (tensor_rank, expert_rank) == (i % tensor, i % expert)
        assert [{n: p.shape for n, p in chunk.named_parameters()} for chunk in chunks] == counted[stage]
        for chunk in chunks:
            _check_buffers(chunk, world_size // pipeline, layout)
        if (stage, i) == last_replica:
            continue
        before = [0, *itertools.accumulate(layout.layers_of_chunks(arch.num_layers))]
        named = ((j, *pair) for j, chunk in enumerate(chunks) for pair in chunk.named_parameters())
        for j, local, parameter in named:
            full = _global_name(local, before[j * pipeline + stage], expert_rank * arch.num_experts // expert)
            if full == "output_layer.weight" and arch.tied_embeddings:
                full = "embedding.word_embeddings.weight"  # the last stage's copy overwrites its equal
            found.setdefault(full, {})[tensor_rank] = parameter.detach()

    shapes = {}
    for entry in entries(arch):
        shards = found.pop(entry.megatron)
        whole = entry.layout.unshard(
            list(shards.values())[:1] if entry.is_expert else [shards[r] for r in range(tensor)]
        )
        shapes |= {n: tuple(t.shape) for n, t in zip(entry.hf, entry.layout.split(whole, arch), strict=True)}
    assert not found
    assert shapes == hf_shapes(arch)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == arch.num_parameters == PARAMETERS[name]


def _check_buffers(model, stage_ranks: int, layout: ParallelConfig) -> None:
    """Check that the distributed optimizer's layout of its buffers has the size that the dry run counts."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    parameters = list(model.parameters())
    replicas = {False: stage_ranks // layout.tensor, True: stage_ranks // layout.expert}
    layouts = DistributedOptimizer.compute_full_param_layout(
        parameters, None, replicas[False], settings, replicas[True]
    ).layouts
    for key, found in layouts.items():
        sizes = [p.numel() for p in found.param_index_map]
        ranks = replicas[key.is_expert_parallel]
        assert found.bucket_indices[-1][1] == _buffer_numel(sizes, ranks)


def _global_name(name: str, first_layer: int, first_expert: int) -> str:
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m[0]) + first_layer), name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda m: str(int(m[0]) + first_expert), name)


def test_layouts_that_do_not_divide_the_model_are_refused():
    dense, experts = (Architecture.from_config(PUBLISHED[name]) for name in ("Qwen3-8B", "Qwen3-30B-A3B"))
    dense.check_parallel(ParallelConfig(tensor=8, pipeline=4))
    with pytest.raises(BadArgument, match="does not divide the model's 36 layers"):
        dense.check_parallel(ParallelConfig(tensor=4, pipeline=8))
    with pytest.raises(BadArgument, match=r"4 x parallel.virtual_pipeline = 2 does not divide the model's 36"):
        dense.check_parallel(ParallelConfig(pipeline=4, virtual_pipeline=2))
    with pytest.raises(BadArgument, match=r"= 8 does not .* 36 layers; parallel.pipeline_layout \[.*\] fits") as error:
        dense.check_parallel(ParallelConfig(pipeline=8))
    fitting = json.loads(re.search(r"\[.*\]", str(error.value))[0])
    dense.check_parallel(ParallelConfig(pipeline=8, pipeline_layout=fitting))
    with pytest.raises(BadArgument, match=r"pipeline_layout holds 35 layers, but the model has 36; .* fits"):
        dense.check_parallel(ParallelConfig(pipeline=2, pipeline_layout=[18, 17]))
    with pytest.raises(BadArgument, match=r"must hold a positive number of layers for each of .* = 4 parts"):
        ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layout=[18, 18])
    with pytest.raises(BadArgument, match=r"set fewer stages"):
        dense.check_parallel(ParallelConfig(pipeline=48))
    with pytest.raises(BadArgument, match=r"parallel.expert = 2, but the model has no experts"):
        dense.check_parallel(ParallelConfig(expert=2))
    experts.check_parallel(ParallelConfig(tensor=4, sequence_parallel=True, expert=16))
    with pytest.raises(BadArgument, match=r"parallel.expert = 3, but the model has 128 experts"):
        experts.check_parallel(ParallelConfig(expert=3))
    with pytest.raises(BadArgument, match=r"needs parallel.sequence_parallel"):
        experts.check_parallel(ParallelConfig(tensor=2))
