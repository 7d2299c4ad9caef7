"""Several nodes on this machine: torchrun's variables put the ranks on different nodes."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_egrsd.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.servers import ServersLost
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import open_engine


def _share(rank, world_size, config, per_node):
    """Return (node led, names, shapes and types of the stream, the rank's share for each size of a bucket)."""
    from megatron_egrsd.fleet.nodes import Nodes

    os.environ["LOCAL_RANK"] = str(rank % per_node)
    with open_engine(config) as engine:
        nodes = Nodes(timeout=60)
        stream = [(n, tuple(t.shape), str(t.dtype)) for n, t in engine.export_weights(placeholders=True)]
        given = []
        for bucket_size in (1, 10_000, 1 << 30):
            shared = nodes.share(engine.export_weights(placeholders=True), engine.device, bucket_size)
            given.append({name: tensor.clone().numpy() for name, tensor in shared})
        return nodes.index, stream, given


@pytest.mark.parametrize(
    ("layout", "experts", "ranks", "per_node"),
    [
        ({"tensor": 2, "pipeline": 2}, 0, 4, 2),
        pytest.param({"pipeline": 2, "expert": 2}, 4, 4, 1, marks=pytest.mark.slow),
        pytest.param({"tensor": 2}, 0, 4, 2, marks=pytest.mark.slow),
    ],
    ids=["PP across nodes", "every rank a node", "DP across nodes"],
)
def test_every_node_gets_all_weights(layout, experts, ranks, per_node, tmp_path):
    sizes = {"num_experts": experts} if experts else {}
    model = make_qwen3(tmp_path / "model", num_hidden_layers=4, tied=False, **sizes)
    layout = {"sequence_parallel": "tensor" in layout, **layout}
    parallel = ParallelConfig(max_tokens_per_microbatch=256, **layout)
    config = Config(model=ModelConfig(str(model), "float32"), data=DataConfig(train="unused"), parallel=parallel)
    checkpoint = load_file(model / "model.safetensors")
    for rank, (index, stream, given) in enumerate(run_ranks(_share, ranks, config, per_node)):
        assert index == (rank // per_node if rank % per_node == 0 else None)
        assert sorted(stream) == sorted((n, tuple(t.shape), "torch.float32") for n, t in checkpoint.items())
        for weights in given:
            assert sorted(weights) == (sorted(checkpoint) if index is not None else [])
            assert all(torch.equal(torch.from_numpy(w), checkpoint[n]) for n, w in weights.items())


FAILURES = {
    "none": ({}, [3 * 4 * 10.0] * 2),
    "first node": ({0: ServersLost("first")}, "ServersLost: first"),
    "second node": ({1: ServersLost("second")}, "ServersLost: second"),
    "both": ({0: ServersLost("first"), 1: RunError("second")}, "RunError: second"),
}


def _fail(rank, world_size):
    """Let each of FAILURES end the use of a stream halfway, then make another call; returns the outcome of each."""
    from megatron_egrsd.fleet.nodes import Nodes

    os.environ["LOCAL_RANK"] = str(rank % 2)
    dist.init_process_group("gloo")
    nodes, seen = Nodes(timeout=60), {}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(10):
            value = torch.full((3,), float(i))
            dist.all_reduce(value)  # every rank must take part to the end
            yield str(i), value if rank == 0 else value.to("meta")

    def consume(weights: Iterator) -> float:
        total = sum(next(weights)[1].sum().item() for _ in range(5))
        if (error := failures.get(nodes.index)) is not None:
            raise error
        return total

    for name in FAILURES:
        failures, _ = FAILURES[name]
        try:
            seen[name] = nodes.each_while(consume, nodes.share(stream(), torch.device("cpu"), 30))
        except RunError as error:
            seen[name] = f"{type(error).__name__}: {error}"
        assert nodes.each(lambda: nodes.index) == [0, 1]
    dist.destroy_process_group()
    return seen


def test_a_failure_on_any_node_reaches_all_and_nobody_waits():
    expected = {name: outcome for name, (_, outcome) in FAILURES.items()}
    assert run_ranks(_fail, 4, timeout=60) == [expected] * 4
