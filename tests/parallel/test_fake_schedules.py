"""Schedules of up to 512 ranks: the engine's own training step, on single ranks of a world that exists only in name.

The published models with all their layers, heads and experts, but narrow. torch's fake process group sends nothing:
every rank receives zeros, and every call is recorded. Each message sent must be expected by its receiver, and a
collective must be the same on all ranks. test_layouts.py checks the numbers, on real ranks.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_egrsd.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_egrsd.data.packing import Sequence
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import hf_shapes
from tests.published import PUBLISHED
from tests.training import open_engine

NARROW = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "moe_intermediate_size": 8, "vocab_size": 128}
MICRO_BATCHES, LENGTH = 8, 16


class Calls(TorchDispatchMode):
    """Recorder of one rank's calls to its process groups. It receives zeros, except for the stages' shapes."""

    def __init__(self, shape: list[int]):
        super().__init__()
        self.shape = torch.tensor(shape)  # stages exchange shapes before they send; all are equal here
        self.sent = defaultdict(list)  # to rank -> (shape, type)
        self.received = defaultdict(list)  # from rank -> (shape, type)
        self.collective = defaultdict(list)  # ranks of a group -> (call, elements of each tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self._note(function.name().removeprefix("c10d::").strip("_"), args)
        if function == torch.ops.c10d.alltoall_base_.default:
            # The fake group copies its input, which fails if another rank would send more than this one does.
            args[0].zero_()
            args = (args[0][:0], args[1][:0], args[2], [], [], *args[5:])
        return function(*args, **(kwargs or {}))

    def _note(self, call: str, args: tuple) -> None:
        tensors = [t for t in _flat(args) if isinstance(t, torch.Tensor)]
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        ranks = tuple(dist.get_process_group_ranks(group))
        if call in ("send", "recv"):
            [tensor], peers = tensors, self.sent if call == "send" else self.received
            peers[ranks[args[2]]].append((tuple(tensor.shape), tensor.dtype))
        else:
            # The other ranks do not know the number of tokens for each expert.
            self.collective[ranks].append((call, [t.numel() for t in tensors if call != "alltoall_base"]))
        if call == "recv":  # which the fake one leaves as it is
            tensor.copy_(self.shape if tensor.dtype == torch.int64 else torch.zeros(()))


def _flat(value) -> list:
    return [x for part in value for x in _flat(part)] if isinstance(value, (list, tuple)) else [value]


def narrow(path: Path, name: str) -> Path:
    """Write a random checkpoint of a published model, narrow."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(PUBLISHED[name] | NARROW))
    shapes = hf_shapes(Architecture.from_pretrained(path))
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=generator) * 0.05 for n, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def run_one(config: Config, world_size: int, rank: int, monkeypatch) -> tuple[Calls, int]:
    """Score and train on one rank; returns (calls, micro-batches)."""

    init, new_group = dist.init_process_group, dist.new_group
    with monkeypatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setattr(dist, "rendezvous", lambda *_, **__: iter([(FakeStore(), rank, world_size)]))
        patch.setattr(dist, "init_process_group", lambda _, **kw: init("fake", **kw | {"store": FakeStore()}))
        patch.setattr(dist, "new_group", lambda *a, **kw: new_group(*a, **kw | {"backend": None}))
        with open_engine(config) as engine:
            samples = MICRO_BATCHES * engine.data_parallel
            sequences = [Sequence([1] * 4, [2 + i % 7] * (LENGTH - 4)) for i in range(samples)]
            partition = engine.partition([len(s) for s in sequences])
            p = config.parallel
            calls = Calls([LENGTH // (p.tensor * p.context if p.sequence_parallel else p.context), 1, 32])
            with calls:
                engine.score(sequences, partition)
                update = engine.train_step(sequences, partition, lambda log_prob, *_: (log_prob.sum(), {}))
            return calls, update.micro_batches


@pytest.mark.parametrize(
    ("name", "world_size", "layout"),
    [
        ("Qwen3-8B", 512, {"tensor": 8, "pipeline": 4, "virtual_pipeline": 3}),
        pytest.param(
            "Qwen3-30B-A3B", 512, {"pipeline": 4, "virtual_pipeline": 3, "expert": 16}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_one_rank_sends_another_expects(name, world_size, layout, tmp_path, monkeypatch):
    model = narrow(tmp_path / "model", name)
    parallel = ParallelConfig(
        sequence_parallel="tensor" in layout, distributed_optimizer=True, max_tokens_per_microbatch=LENGTH, **layout
    )
    config = Config(
        model=ModelConfig(str(model), "float32"),
        data=DataConfig(train="unused"),
        rollout=RolloutConfig(rollouts_per_prompt=8),  # 256 rollouts divide over the replicas of 512 ranks
        parallel=parallel,
    )
    of_a_stage, last = world_size // parallel.pipeline, parallel.pipeline - 1
    # The first rank of every stage; of one stage also the rank beside it (in TP or EP) and one of the last replica.
    ranks = [stage * of_a_stage for stage in range(parallel.pipeline)]
    ranks += [of_a_stage + 1, 2 * of_a_stage - max(parallel.tensor, parallel.expert)]
    calls = {}
    for rank in ranks:
        calls[rank], micro_batches = run_one(config, world_size, rank, monkeypatch)
        assert micro_batches == MICRO_BATCHES

    for rank, own in calls.items():
        stage, place = divmod(rank, of_a_stage)
        before, behind = ((stage + step) % parallel.pipeline * of_a_stage + place for step in (-1, 1))
        assert own.sent.keys() == own.received.keys() == {before, behind}
        for other in {before, behind} & calls.keys():
            assert own.sent[other] == calls[other].received[rank], (rank, other)
        # The last stage sends all chunks but its last to the first. Rows in scoring and training, then gradients.
        chunks = {other: parallel.virtual_pipeline - (stage == edge) for other, edge in ((behind, last), (before, 0))}
        moved = {other: sum(dtype.is_floating_point for _, dtype in own.sent[other]) for other in chunks}
        assert moved == {behind: 2 * MICRO_BATCHES * chunks[behind], before: MICRO_BATCHES * chunks[before]}
        for group, made in own.collective.items():
            assert rank in group
            for other in set(group) & calls.keys():
                assert made == calls[other].collective[group], (rank, other, group)
