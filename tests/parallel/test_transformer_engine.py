"""Transformer Engine's layers, built without a GPU: names, shapes, marks and checkpoint keys are those of our own.

Runs if Transformer Engine's Python part is installed and there is no GPU:

    pip install --no-deps --target DIR transformer-engine==2.20.2 transformer-engine-cu13==2.20.2 \\
        onnxscript onnx onnx-ir ml-dtypes
    PYTHONPATH=DIR python -m pytest tests/parallel/test_transformer_engine.py

In the environment itself it would break all else: megatron-core imports it, and it needs CUDA's libraries. Its compiled
part, which needs CUDA, is replaced by names without content: the layers can be built, filled and exported, but not run.
"""

import dataclasses
import enum
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from tests.random_checkpoints import DENSE, LLAMA, MOE, QWEN2, random_qwen3
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("transformer_engine"), reason="needs Transformer Engine's Python"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
]
# Keys that only Transformer Engine's norms request; engine/checkpoint.py does not need them, hf/ writes them.
NORMS = {"decoder.final_layernorm._extra_state"}
HEAD_NORMS = {f"decoder.layers.self_attention.{name}_layernorm._extra_state" for name in "qk"}
NORM_BEFORE_EXPERTS = "decoder.layers.pre_mlp_layernorm._extra_state"
LAYOUTS = {
    "TP1": (DENSE, {}),
    "TP2": (DENSE, {"tensor": 2}),
    "TP2 SP": (DENSE, {"tensor": 2, "sequence_parallel": True}),
    "PP2 VPP2": (DENSE, {"pipeline": 2, "virtual_pipeline": 2}),
    "Qwen2 TP2": (QWEN2, {"tensor": 2}),
    "Llama PP2": (LLAMA, {"pipeline": 2}),
    "experts": (MOE, {}),
    "experts EP2": (MOE, {"expert": 2}),
    "experts TP2 SP": (MOE, {"tensor": 2, "sequence_parallel": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_are_filled_exported_and_stored_alike(layout, tmp_path):
    base, sizes = LAYOUTS[layout]
    parallel = ParallelConfig(**sizes)
    path = random_qwen3(tmp_path / "model", base=base, hidden_size=32, num_hidden_layers=4)
    ranks = parallel.tensor * parallel.pipeline * parallel.expert
    keys, parameters = {"always": {}, "never": {}}, {"always": {}, "never": {}}
    for rank, answer in enumerate(run_ranks(_build, ranks, path, parallel, fresh=True)):
        for layers, (differing, marks, stored) in answer.items():
            assert not differing, f"{layers}, rank {rank}: {differing}"
            parameters[layers][rank] = marks
            for key, places in stored.items():
                keys[layers].setdefault(key, []).append((rank, sorted(places)))
    assert parameters["always"] == parameters["never"]
    more = {key for key in keys["always"] if key not in keys["never"]}
    head_norms = HEAD_NORMS if base in (DENSE, MOE) else set()
    assert more == NORMS | head_norms | ({NORM_BEFORE_EXPERTS} if base is MOE else set())
    assert {key: places for key, places in keys["always"].items() if key not in more} == keys["never"]


def _build(rank, world_size, path, parallel):
    """Return, for both kinds of layers: tensors that changed on the way, marks by parameter, places by key."""
    _stand_in()
    from megatron_egrsd.engine import distributed, model
    from megatron_egrsd.engine.weights import export_hf, load_hf
    from megatron_egrsd.hf.checkpoint import HFCheckpoint
    from megatron_egrsd.hf.mapping import local_name

    distributed.initialize(parallel, seed=0)
    checkpoint = HFCheckpoint(path)
    model.use_transformer_engine = lambda parallel, dtype: parallel.transformer_engine == "always"
    answer = {}
    for layers in ("always", "never"):
        chosen = dataclasses.replace(parallel, transformer_engine=layers)
        config = model.transformer_config(checkpoint.architecture, chosen, torch.bfloat16)
        torch.cuda.is_available = lambda: True  # Transformer Engine's layers refuse to exist without
        try:
            chunks = model.build_model(checkpoint.architecture, config, chosen)
        finally:
            torch.cuda.is_available = lambda: False
        load_hf(chunks, checkpoint)
        exported = [(n, t) for n, t in export_hf(chunks, checkpoint.architecture) if not t.is_meta]
        bits = [(n, t.view(torch.int16), checkpoint[n].view(torch.int16)) for n, t in exported]
        differing = [n for n, found, expected in bits if not torch.equal(found, expected)]
        parameters = [(local_name(n), p) for chunk in chunks for n, p in chunk.named_parameters()]
        stored = {}
        for chunk in chunks:
            _collect(chunk.sharded_state_dict(metadata={"distrib_optim_sharding_type": "fully_reshardable"}), stored)
        answer[layers] = differing, sorted((n, *_marks(p)) for n, p in parameters), stored
    distributed.shutdown()
    return answer


@pytest.mark.parametrize("layout", ["TP2 SP", "PP2 VPP2", "experts TP2 SP"])
def test_adapters_are_beside_both_kinds_of_layers(layout, tmp_path):
    """Names, marks and shapes are alike, and so are the weights that leave; no input is hidden in a fused norm."""
    base, sizes = LAYOUTS[layout]
    parallel = ParallelConfig(**sizes)
    path = random_qwen3(tmp_path / "model", base=base, hidden_size=32, num_hidden_layers=4)
    targets = ATTENTION if base is MOE else TARGETS
    for answer in run_ranks(_build_with_adapters, 2, path, parallel, targets, fresh=True):
        engine, local = answer["always"], answer["never"]
        assert engine[0] == local[0], "parameters and marks"
        assert engine[1].keys() == local[1].keys()
        assert all((engine[1][name] == local[1][name]).all() for name in local[1])
        assert not engine[2], "linear layers with a norm inside"


def _build_with_adapters(rank, world_size, path, parallel, targets):
    """Return, for both kinds of layers: marks of the trained parameters, exported bits, adapted layers with a norm."""
    _stand_in()
    from megatron_egrsd.engine import distributed, model
    from megatron_egrsd.engine.adapters import attach_adapters
    from megatron_egrsd.engine.weights import export_adapter, export_hf, load_hf
    from megatron_egrsd.hf.adapters import AdapterSpec, adapter_shapes
    from megatron_egrsd.hf.checkpoint import HFCheckpoint

    distributed.initialize(parallel, seed=0)
    checkpoint = HFCheckpoint(path)
    arch, spec = checkpoint.architecture, AdapterSpec(4, 8.0, targets)
    values = {n: torch.rand(shape, generator=torch.Generator().manual_seed(len(n))) for n, shape in
              adapter_shapes(arch, spec).items()}  # fmt: skip
    model.use_transformer_engine = lambda parallel, dtype: parallel.transformer_engine == "always"
    answer = {}
    for layers in ("always", "never"):
        chosen = dataclasses.replace(parallel, transformer_engine=layers)
        config = model.transformer_config(arch, chosen, torch.bfloat16)
        torch.cuda.is_available = lambda: True  # Transformer Engine's layers refuse to exist without
        try:
            chunks = model.build_model(arch, config, chosen, spec)
        finally:
            torch.cuda.is_available = lambda: False
        load_hf(chunks, checkpoint)
        attach_adapters(chunks, arch, config, spec, values.__getitem__)
        named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters()]
        marks = sorted((name, *_marks(p)) for name, p in named if p.requires_grad)
        tensors = [*export_hf(chunks, arch), *export_adapter(chunks, arch, spec)]
        bits = {name: tensor.view(torch.int16).numpy() for name, tensor in tensors if not tensor.is_meta}
        hidden = [name for name, _ in named if "layer_norm_weight" in name]
        answer[layers] = marks, bits, hidden
    distributed.shutdown()
    return answer


def _marks(parameter):
    """Return the attributes that determine the reduction of the parameter's gradient, besides its shape."""
    split = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    reduced = getattr(parameter, "sequence_parallel", False), getattr(parameter, "allreduce", True)
    return tuple(parameter.shape), split, *map(bool, reduced)


def _collect(state: dict, stored: dict) -> None:
    """Collect the (shape, offset) of every tensor and the shape of every object, by key."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    for part in state.values():
        built = part.build() if isinstance(part, ShardedTensorFactory) else part
        for one in built if isinstance(built, list) else built.values() if isinstance(built, dict) else [built]:
            if isinstance(one, ShardedTensor):
                stored.setdefault(one.key, []).append((one.global_shape, one.global_offset))
            elif isinstance(one, ShardedObject):
                stored.setdefault(one.key, []).append((one.global_shape,))


def _value(name: str) -> "_Value":
    if name.startswith("__"):
        raise AttributeError(name)
    return _Value()


class _Name(type):
    """A class any of whose attributes is a value without content."""

    def __getattr__(cls, name):
        return _value(name)


class _Value(metaclass=_Name):
    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return _value(name)

    def __int__(self):
        return 0


class _Extension(types.ModuleType):
    def __getattr__(self, name):
        _value(name)  # raises for the names that importlib and inspect look up
        return _Name(name, (_Value,), {})


def _stand_in() -> None:
    """Import Transformer Engine with an empty `transformer_engine_torch`, on a device that it takes for an H100.

    This must happen before the import of megatron-core, which imports Transformer Engine too.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no CUDA library is loaded
    extension = _Extension("transformer_engine_torch")
    extension.__spec__ = ModuleSpec("transformer_engine_torch", None)
    # Two enumerations of which Transformer Engine compares the names with its own.
    types_of = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
    extension.DType = enum.IntEnum("DType", types_of, start=0)
    backends = "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8"
    extension.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends, start=0)
    sys.modules["transformer_engine_torch"] = extension
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    from transformer_engine import common

    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch  # noqa: F401
