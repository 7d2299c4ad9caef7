"""A model in a Megatron-LM checkpoint directory: the torch_dist tensor of each mapping entry, and the other files.

    DIR/latest_checkpointed_iteration.txt   "release" (weights without training state) or the last iteration
    DIR/release/ or DIR/iter_0000100/       the torch_dist checkpoint
    DIR/huggingface/                        config.json, tokenizer, ...: the files that an export needs besides weights

megatron-core stacks a tensor of every layer along a leading layer dimension, and the experts' along a second one;
decoder.layers.3.mlp.linear_fc2.weight is row 3 of decoder.layers.mlp.linear_fc2.weight [layers, H, F].
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.byte_ranges import Range
from megatron_egrsd.hf.mapping import TRANSFORMER_ENGINE_NAMES, Entry, GateUp, Vocabulary, entries, hf_shapes
from megatron_egrsd.hf.torch_dist_reader import CONFIG, TorchDistReader

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
SIDECAR = "huggingface"

# megatron-core stores local layers under Transformer Engine's names: its checkpoints do not depend on the layers.
_STORED_NAMES = {local: stored for stored, local in TRANSFORMER_ENGINE_NAMES.items()}
# Layers with extra state (Transformer Engine's FP8 scales, else empty) that a model requires when it loads. Transformer
# Engine 2.0 and later refuse a checkpoint without the norms' extra state.
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj")
_HEAD_NORM_EXTRA_STATES = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_DENSE_EXTRA_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
_MOE_EXTRA_STATES = ("pre_mlp_layernorm",)
_EXPERT_EXTRA_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class StoredPlace:
    """A tensor of the model as part of a stored tensor: `key`[`index`]; `lead` are the leading sizes of `key`."""

    key: str
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()


def places(entry: Entry, arch: Architecture) -> list[StoredPlace]:
    """Return the places at which `entry` may be stored: first the stacked one, which this project writes.

    The others, one tensor per layer or expert, come from non_homogeneous_layers and singleton_local_shards.
    """
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", entry.megatron)
    if not found:
        return [StoredPlace(entry.megatron)]
    layer, name = int(found[1]), found[2]
    expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", name)
    if expert:
        e, name = int(expert[1]), f"mlp.experts.experts.{expert[2]}"
        return [
            StoredPlace(f"decoder.layers.{name}", (layer, e), (arch.num_layers, arch.num_experts)),
            StoredPlace(f"decoder.layers.{layer}.{name}", (e,), (arch.num_experts,)),
            StoredPlace(f"decoder.layers.{layer}.mlp.experts.experts.{e}.{expert[2]}"),
        ]
    names = [_STORED_NAMES.get(name, name)]
    if arch.num_experts and name == "pre_mlp_layernorm.weight":
        names.insert(0, name)  # not fused before a router, though local layers store it under the fused name
    return [
        place
        for name in names
        for place in (
            StoredPlace(f"decoder.layers.{name}", (layer,), (arch.num_layers,)),
            StoredPlace(f"decoder.layers.{layer}.{name}"),
        )
    ]


def megatron_shape(entry: Entry, arch: Architecture, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the entry's full tensor without padding: its parts stacked along the first dimension."""
    parts = [shapes[name] for name in entry.hf]
    return (sum(part[0] for part in parts), *parts[0][1:])


def extra_states(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield (key, offsets, global shape) of the empty extra states beside the weights."""
    yield "decoder.final_layernorm._extra_state", (0,), (1,)
    attention = _EXTRA_STATES + (_HEAD_NORM_EXTRA_STATES if arch.family.qk_norm else ())
    for layer in range(arch.num_layers):
        for name in attention + (_MOE_EXTRA_STATES if arch.num_experts else _DENSE_EXTRA_STATES):
            yield f"decoder.layers.{name}._extra_state", (layer,), (arch.num_layers,)
        for expert in range(arch.num_experts):
            for name in _EXPERT_EXTRA_STATES:
                key = f"decoder.layers.{name}._extra_state"
                yield key, (layer, expert), (arch.num_layers, arch.num_experts)


def common_state(arch: Architecture, dtype: torch.dtype) -> dict:
    """Return the common state that Megatron-LM expects beside the tensors; --use-checkpoint-args reads its `args`."""
    return {
        "args": Namespace(**_model_args(arch), bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
                          params_dtype=dtype, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
                          consumed_train_samples=0, consumed_valid_samples=0, iteration=0,
                          tokenizer_type="HuggingFaceTokenizer"),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    }  # fmt: skip


def _model_args(arch: Architecture) -> dict:
    """Return the architecture under the names of Megatron-LM's arguments."""
    args = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_heads,
        "group_query_attention": True,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "norm_epsilon": arch.rms_norm_eps,
        "qk_layernorm": arch.family.qk_norm,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch.family.qkv_bias,
        "position_embedding_type": "rope",
        "rotary_base": int(arch.rope_theta) if arch.rope_theta.is_integer() else arch.rope_theta,
        "rotary_percent": 1.0,
        "seq_length": arch.max_position_embeddings,
        "max_position_embeddings": arch.max_position_embeddings,
        "untie_embeddings_and_output_weights": not arch.tied_embeddings,
        "vocab_size": arch.vocab_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if arch.rope_scaling:
        args |= arch.rope_scaling.megatron_args
    if arch.num_experts:
        args |= {
            "num_experts": arch.num_experts,
            "moe_router_topk": arch.experts_per_token,
            "moe_ffn_hidden_size": arch.expert_intermediate_size,
            "moe_layer_freq": 1,
        }
    return args


class MegatronCheckpoint:
    """The weights in a Megatron-LM directory, by mapping entry.

    `like` is a Hugging Face directory with config.json and tokenizer. It is needed if the checkpoint does not carry
    these files (a training run's checkpoint does not). Raises BadArgument if `path` is not a Megatron-LM directory,
    holds an adapter in place of the weights, or does not fit the config.
    """

    def __init__(self, path: str | Path, like: str | Path | None = None):
        self.path = Path(path)
        self.directory, self.root = locate(self.path)
        carried = self.root / SIDECAR
        if like is None and not (carried / "config.json").is_file():
            raise BadArgument(
                f"{self.path} carries no {SIDECAR}/config.json; "
                "name with --like the Hugging Face model it was made from"
            )
        self.like = Path(like) if like is not None else carried
        self.architecture = Architecture.from_pretrained(self.like)
        self.reader = TorchDistReader(self.directory)
        common = self.reader.common()
        if common.get("adapter"):
            raise BadArgument(
                f"{self.path} is the checkpoint of a run with lora.rank, which holds the adapter alone, without the "
                "model's weights; take the run's output/hf, or its model and output/adapter"
            )
        self._check_args(common.get("args"))

    def problems(self) -> list[str]:
        """Return every error in names, shapes, types and chunks, each with the tensor's name."""
        arch, reader, shapes = self.architecture, self.reader, hf_shapes(self.architecture)
        found, expected_keys, shape_of = [], set(), {}
        for entry in entries(arch):
            expected = megatron_shape(entry, arch, shapes)
            place = self._place(entry)
            if place is None:
                found.append(f"{places(entry, arch)[0].key} is missing: {entry.megatron} is not in the checkpoint")
                continue
            for key in self._keys(place):
                half = (expected[0] // 2, *expected[1:]) if key != place.key else expected
                expected_keys.add(key)
                shape_of[key] = (isinstance(entry.layout, Vocabulary), (*place.lead, *half))
        for key, (is_vocabulary, expected) in shape_of.items():
            shape = reader.tensors[key].shape
            padded = is_vocabulary and len(shape) == 2 and shape[0] >= expected[0] and shape[1] == expected[1]
            if shape != expected and not padded:
                found.append(f"{key} has shape {list(shape)}, but config.json implies {list(expected)}")
                continue
            try:
                reader.check_tiling(key)
            except RunError as error:
                found.append(str(error))
        extra = sorted(set(reader.tensors) - expected_keys)
        found += [f"{key} is not a tensor of this model" for key in extra if not is_state(key)]
        return found

    def training_state(self) -> list[str]:
        """Return the keys of the tensors of a run (optimizer, scheduler, teacher), which a conversion ignores."""
        return [key for key in self.reader.tensors if is_state(key)]

    def dtype(self) -> torch.dtype:
        """Return the dtype of all weights. Raises BadArgument if they differ."""
        found = {
            self.reader.tensors[k].dtype: k for e in entries(self.architecture) for k in self._keys(self._place(e))
        }
        if len(found) > 1:
            raise BadArgument(f"{self.path} mixes {' and '.join(f'{t} ({k})' for t, k in found.items())}")
        return next(iter(found))

    def ranges(self, entry: Entry, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[Range]]:
        """Return the byte ranges of the Hugging Face tensors of one entry, in order, without padding.

        `shapes` is `hf_shapes(...)`. Raises RunError if a chunk is missing or damaged.
        """
        place, sizes = self._place(entry), [shapes[name][0] for name in entry.hf]
        keys = self._keys(place)
        found, row = {name: [] for name in entry.hf}, 0
        for i, first, end in entry.layout.rows(sizes, self.architecture):
            half, inside = divmod(row, sum(sizes) // len(keys))
            found[entry.hf[i]] += self.reader.ranges(keys[half], place.index, inside, inside + end - first)
            row += end - first
        return found

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """Return the dtype in which `entry` is stored."""
        return self.reader.tensors[self._keys(self._place(entry))[0]].dtype

    def stored_as(self, entry: Entry) -> str:
        """Return where `entry` is stored: its tensors, each with the index of the entry in it."""
        place = self._place(entry)
        return " and ".join(f"{key}{list(place.index)}" for key in self._keys(place))

    def _place(self, entry: Entry) -> StoredPlace | None:
        """Return the first place of which all stored tensors are there, or None."""
        for place in places(entry, self.architecture):
            keys = self._keys(place)
            if (len(keys) == 1 or isinstance(entry.layout, GateUp)) and all(key in self.reader.tensors for key in keys):
                return place
        return None

    def _keys(self, place: StoredPlace) -> list[str]:
        """Return the stored tensors of a place: one, or gate and up apart (megatron-core's singleton_local_shards)."""
        return [place.key] if place.key in self.reader.tensors else [f"{place.key}_w", f"{place.key}_v"]

    def _check_args(self, args: Namespace | None) -> None:
        arch = self.architecture
        expected = _model_args(arch)
        for name in ("seq_length", "max_position_embeddings", "vocab_size", "hidden_dropout", "attention_dropout"):
            del expected[name]  # a property of the run, not of the weights
        if arch.num_experts:
            del expected["ffn_hidden_size"]  # of dense layers, which a mixture does not have
        if arch.num_kv_heads == arch.num_heads and getattr(args, "group_query_attention", None) is False:
            del expected["group_query_attention"], expected["num_query_groups"]  # unused then, and 1 by default
        for name, value in expected.items():
            found = getattr(args, name, None)
            if isinstance(found, bool | int | float | str) and found != value:
                raise BadArgument(
                    f"{self.path} was saved with {name} = {found}, but {self.like}/config.json implies {value}"
                )


def is_state(key: str) -> bool:
    """Return whether a stored tensor is state of the training run (optimizer, teacher, ...), not of the model."""
    return key.startswith(("optimizer.", "teacher.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler"))


def locate(path: Path) -> tuple[Path, Path]:
    """Return (torch_dist directory, Megatron-LM directory) for a `path` that is either. Raises BadArgument if not."""
    if not path.is_dir():
        raise BadArgument(f"the Megatron checkpoint {path} does not exist")
    if (path / CONFIG).is_file():
        return path, path.absolute().parent
    tracker = path / TRACKER
    if not tracker.is_file():
        raise BadArgument(f"{path} holds neither {TRACKER} nor {CONFIG}, so it is not a Megatron checkpoint")
    name = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if name != RELEASE and not name.isdecimal():
        raise BadArgument(f"{tracker} says {name!r}, which is neither {RELEASE} nor an iteration")
    directory = path / (name if name == RELEASE else f"iter_{int(name):07d}")
    if not (directory / CONFIG).is_file():
        legacy = " (an old checkpoint with mp_rank_ directories?)" if list(directory.glob("mp_rank_*")) else ""
        raise BadArgument(f"{directory} holds no {CONFIG}, so it is not a torch_dist checkpoint{legacy}")
    return directory, path
