"""Every published config.json of the families: read, counted, mapped both ways and planned. Shapes only."""

import dataclasses
import itertools
import math

import pytest
import torch

from megatron_egrsd.config import ParallelConfig, TeacherConfig
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import entries, hf_shapes
from megatron_egrsd.planning.activations import Placement
from megatron_egrsd.planning.memory import rank_memory
from tests.published import PARAMETERS, PUBLISHED


def test_every_model_has_its_figures():
    assert PARAMETERS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    arch = Architecture.from_config(PUBLISHED[name])
    assert arch.num_parameters == PARAMETERS[name]
    assert sum(map(math.prod, hf_shapes(arch).values())) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_round_trip_at_every_tensor_parallel_size(name):
    """Two layers, on the meta device."""
    arch = dataclasses.replace(Architecture.from_config(PUBLISHED[name]), num_layers=2)
    shapes = hf_shapes(arch)
    for tensor in (n for n in (1, 2, 4, 8) if arch.num_kv_heads % n == 0 and arch.num_heads % n == 0):
        for entry in entries(arch):
            full = entry.layout.join([torch.empty(shapes[n], device="meta") for n in entry.hf], arch, tensor)
            ranks = 1 if entry.is_expert else tensor
            shards = [entry.layout.shard(full, rank, ranks) for rank in range(ranks)]
            assert len({shard.shape for shard in shards}) == 1
            again = entry.layout.split(entry.layout.unshard(shards), arch)
            assert [tuple(part.shape) for part in again] == [shapes[n] for n in entry.hf]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_divides_the_parameters(name):
    """The weights of the two stages of a pipeline are the model, and the copy of a tied embedding."""
    arch, parallel, place = Architecture.from_config(PUBLISHED[name]), ParallelConfig(pipeline=2), Placement(True, True)
    sizes = {"tokens": 4096, "itemsize": 2, "bucket_bytes": 1 << 29, "teacher": TeacherConfig(weights="live")}
    stages = [rank_memory(arch, parallel, 2, stage, place, **sizes) for stage in (0, 1)]
    copied = arch.padded_vocab_size(1) * arch.hidden_size if arch.tied_embeddings else 0
    padding = (arch.padded_vocab_size(1) - arch.vocab_size) * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    assert sum(m.resident["weights"] for m in stages) == 2 * (PARAMETERS[name] + copied + padding)


def test_balanced_layers():
    """The division is the fastest of all: by enumeration of a small model's, with the head's cost in layers."""
    arch = dataclasses.replace(Architecture.from_config(PUBLISHED["Qwen3-8B"]), num_layers=9)
    head = arch.vocab_size * arch.hidden_size / (arch.num_parameters - 2 * arch.vocab_size * arch.hidden_size) * 9

    def slowest(layers):
        return max(*layers[:-1], layers[-1] + head)

    for chunks in (2, 3, 4):
        every = (c for c in itertools.product(range(1, 10), repeat=chunks) if sum(c) == 9)
        assert slowest(arch.balanced_layers(chunks)) == pytest.approx(min(map(slowest, every)), rel=1e-4)
    assert sum(Architecture.from_config(PUBLISHED["Qwen3-235B-A22B"]).balanced_layers(8)) == 94
