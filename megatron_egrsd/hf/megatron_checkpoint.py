"""Qwen3 inside a Megatron-LM checkpoint directory: which torch_dist tensor each mapping entry is, and the files around.

    DIR/latest_checkpointed_iteration.txt   "release" (weights without training state) or the last iteration
    DIR/release/ or DIR/iter_0000100/       the torch_dist checkpoint
    DIR/huggingface/                        config.json, tokenizer, ...: what an export needs besides weights

megatron-core stacks a tensor of every layer along a leading layer dimension, and the experts' along a second one;
decoder.layers.3.mlp.linear_fc2.weight is row 3 of decoder.layers.mlp.linear_fc2.weight [layers, H, F].
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.byte_ranges import Range
from megatron_egrsd.hf.mapping import Entry, GateUp, Vocabulary, entries, hf_shapes
from megatron_egrsd.hf.torch_dist_reader import CONFIG, TorchDistReader

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
SIDECAR = "huggingface"

# megatron-core stores local layers under Transformer Engine's names: its checkpoints do not depend on the layers.
_STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Layers with extra state (Transformer Engine's FP8 scales; nothing otherwise) that a model asks for when it loads. The
# norms are asked for by Transformer Engine from 2.0 on, which refuses a checkpoint without them.
_EXTRA_STATES = tuple(f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"))
_DENSE_EXTRA_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
_MOE_EXTRA_STATES = ("pre_mlp_layernorm",)
_EXPERT_EXTRA_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class Place:
    """A tensor of the model as a part of a stored one: `key`[`index`], where `key` has leading sizes `lead`."""

    key: str
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()


def places(entry: Entry, arch: Architecture) -> list[Place]:
    """Where `entry` may be stored: first the stacked place that we write, then one tensor per layer and per expert.

    The others come from megatron-core's non_homogeneous_layers and singleton_local_shards.
    """
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", entry.megatron)
    if not found:
        return [Place(entry.megatron)]
    layer, name = int(found[1]), found[2]
    expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", name)
    if expert:
        e, name = int(expert[1]), f"mlp.experts.experts.{expert[2]}"
        return [
            Place(f"decoder.layers.{name}", (layer, e), (arch.num_layers, arch.num_experts)),
            Place(f"decoder.layers.{layer}.{name}", (e,), (arch.num_experts,)),
            Place(f"decoder.layers.{layer}.mlp.experts.experts.{e}.{expert[2]}"),
        ]
    names = [_STORED_NAMES.get(name, name)]
    if arch.num_experts and name == "pre_mlp_layernorm.weight":
        names.insert(0, name)  # before a router it is fused with nothing, though local layers store it as if it were
    return [
        place
        for name in names
        for place in (
            Place(f"decoder.layers.{name}", (layer,), (arch.num_layers,)),
            Place(f"decoder.layers.{layer}.{name}"),
        )
    ]


def megatron_shape(entry: Entry, arch: Architecture, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the entry's full tensor without padding: its parts stacked along the first dimension."""
    parts = [shapes[name] for name in entry.hf]
    return (sum(part[0] for part in parts), *parts[0][1:])


def extra_states(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(key, offsets, global shape) of the empty extra states beside the weights."""
    yield "decoder.final_layernorm._extra_state", (0,), (1,)
    for layer in range(arch.num_layers):
        for name in _EXTRA_STATES + (_MOE_EXTRA_STATES if arch.num_experts else _DENSE_EXTRA_STATES):
            yield f"decoder.layers.{name}._extra_state", (layer,), (arch.num_layers,)
        for expert in range(arch.num_experts):
            for name in _EXPERT_EXTRA_STATES:
                key = f"decoder.layers.{name}._extra_state"
                yield key, (layer, expert), (arch.num_layers, arch.num_experts)


def common_state(arch: Architecture, dtype: torch.dtype) -> dict:
    """What Megatron-LM expects beside the tensors; `args` makes its --use-checkpoint-args work."""
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
    """The architecture under the names of Megatron-LM's arguments."""
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
        "qk_layernorm": True,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
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
    if arch.num_experts:
        args |= {
            "num_experts": arch.num_experts,
            "moe_router_topk": arch.experts_per_token,
            "moe_ffn_hidden_size": arch.expert_intermediate_size,
            "moe_layer_freq": 1,
        }
    return args


class MegatronCheckpoint:
    """The Qwen3 weights in a Megatron-LM directory, by mapping entry.

    Give it `like`, a Hugging Face directory, where the checkpoint does not carry config.json and tokenizer itself
    (one that a training run saved). BadArgument where the path is not such a directory or does not fit the config.
    """

    def __init__(self, path: str | Path, like: str | Path | None = None):
        self.path = Path(path)
        self.directory, self.root = _locate(self.path)
        carried = self.root / SIDECAR
        if like is None and not (carried / "config.json").is_file():
            raise BadArgument(
                f"{self.path} carries no {SIDECAR}/config.json; "
                "name with --like the Hugging Face model it was made from"
            )
        self.like = Path(like) if like is not None else carried
        self.architecture = Architecture.from_pretrained(self.like)
        self.reader = TorchDistReader(self.directory)
        self._check_args()

    def problems(self) -> list[str]:
        """Everything wrong with names, shapes, types and chunks, each with the tensor's name; empty if all is well."""
        arch, reader, shapes = self.architecture, self.reader, hf_shapes(self.architecture)
        found, known, shape_of = [], set(), {}
        for entry in entries(arch):
            expected = megatron_shape(entry, arch, shapes)
            place = self._place(entry)
            if place is None:
                found.append(f"{places(entry, arch)[0].key} is missing: {entry.megatron} is not in the checkpoint")
                continue
            for key in self._keys(place):
                half = (expected[0] // 2, *expected[1:]) if key != place.key else expected
                known.add(key)
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
        found += [
            f"{key} is not a tensor of this model" for key in sorted(set(reader.tensors) - known) if not is_state(key)
        ]
        return found

    def training_state(self) -> list[str]:
        """Keys of optimizer and scheduler tensors, which conversion leaves alone."""
        return [key for key in self.reader.tensors if is_state(key)]

    def dtype(self) -> torch.dtype:
        """The one type of all weights; BadArgument where they differ."""
        found = {
            self.reader.tensors[k].dtype: k for e in entries(self.architecture) for k in self._keys(self._place(e))
        }
        if len(found) > 1:
            raise BadArgument(f"{self.path} mixes {' and '.join(f'{t} ({k})' for t, k in found.items())}")
        return next(iter(found))

    def nbytes(self) -> int:
        """Bytes of the weights without padding."""
        itemsize = self.dtype().itemsize
        return sum(torch.Size(shape).numel() * itemsize for shape in hf_shapes(self.architecture).values())

    def ranges(self, entry: Entry, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[Range]]:
        """Where the bytes of the Hugging Face tensors of one entry lie, in order, without padding.

        `shapes` is `hf_shapes`. RunError where a chunk is missing or damaged.
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
        """The type one entry is stored in."""
        return self.reader.tensors[self._keys(self._place(entry))[0]].dtype

    def _place(self, entry: Entry) -> Place | None:
        for place in places(entry, self.architecture):
            if isinstance(entry.layout, GateUp) and f"{place.key}_w" in self.reader.tensors:
                return place
            if place.key in self.reader.tensors:
                return place
        return None

    def _keys(self, place: Place) -> list[str]:
        """The stored tensors of a place: itself, or gate and up apart (megatron-core's singleton_local_shards)."""
        return [place.key] if place.key in self.reader.tensors else [f"{place.key}_w", f"{place.key}_v"]

    def _check_args(self) -> None:
        args = self.reader.common().get("args")
        for name, expected in _model_args(self.architecture).items():
            found = getattr(args, name, None)
            if name in ("seq_length", "max_position_embeddings", "vocab_size") or "dropout" in name or found is None:
                continue  # of the run, not of the weights
            if found != expected and isinstance(found, bool | int | float | str):
                raise BadArgument(
                    f"{self.path} was saved with {name} = {found}, but {self.like}/config.json implies {expected}"
                )


def is_state(key: str) -> bool:
    """Whether a stored tensor belongs to the training run (optimizer, random states) and not to the model."""
    return key.startswith(("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler"))


def _locate(path: Path) -> tuple[Path, Path]:
    """(torch_dist directory, Megatron-LM directory) of either of the two."""
    if not path.is_dir():
        raise BadArgument(f"the Megatron checkpoint {path} does not exist")
    if (path / CONFIG).is_file():
        return path, path.parent
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


def describe(arch: Architecture) -> str:
    """One line about the model for plans and reports."""
    kind = f"{arch.num_experts} experts" if arch.num_experts else "dense"
    tied = "tied" if arch.tied_embeddings else "untied"
    return (f"Qwen3 {kind}, {arch.num_parameters / 1e9:.2f}B parameters, {arch.num_layers} layers, "
            f"vocabulary {arch.vocab_size} ({tied})")  # fmt: skip


def read_json(path: Path) -> dict:
    """A JSON object; BadArgument where the file is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadArgument(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadArgument(f"{path} is not a JSON object")
    return found
