"""Reader and writer of adapters in PEFT's own format: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_egrsd.config import LoraConfig
from megatron_egrsd.config.lora import TARGETS
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_shapes, adapter_spec
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.safetensors_file import DTYPES, open_safetensors, write_tensors
from megatron_egrsd.hf.staging import staged
from megatron_egrsd.system.files import read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys that say nothing about the function of a trained adapter. Every other key that is set asks for something else
# than y = W x + alpha / r * B A x.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("lora_dropout", "layers_pattern", "loftq_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("peft_type", "r", "lora_alpha", "target_modules", "init_lora_weights"),  # checked below
    "eva_config",  # ranks that EVA has moved are in rank_pattern
}
_SAME_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that leave W as it is


class AdapterFile:
    """Lazy view of an adapter directory for a model of architecture `arch`: a tensor is read when it is accessed.

    `spec` is its rank, alpha and targets. The constructor raises BadArgument if a file is missing or damaged, if the
    adapter needs an option of PEFT that is not supported, or if a tensor is missing, unknown or of another shape than
    the model implies.
    """

    def __init__(self, path: str | Path, arch: Architecture):
        self.path = Path(path)
        self.spec = read_spec(self.path)
        self.spec.check(arch)
        self.shapes = adapter_shapes(arch, self.spec)
        self._tensors = self._open()
        self._check()

    def _open(self):
        file = self.path / WEIGHTS
        if not file.is_file():
            raise BadArgument(f"{self.path} holds no {WEIGHTS}; the weights of an adapter must be safetensors")
        return open_safetensors(file)

    def _check(self) -> None:
        names = set(self._tensors.keys())
        missing, extra = self.shapes.keys() - names, names - self.shapes.keys()
        if missing or extra:
            what = f"lacks {min(missing)}" if missing else f"has the unknown tensor {min(extra)}"
            raise BadArgument(
                f"{self.path / WEIGHTS} {what} ({len(missing)} missing, {len(extra)} unknown); the adapter is not one "
                f"of this model, or not of {', '.join(self.spec.targets)}"
            )
        for name, shape in self.shapes.items():
            view = self._tensors.get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise BadArgument(
                    f"{name} in {self.path} has shape {view.get_shape()}, but the model and r = {self.spec.rank} imply "
                    f"{list(shape)}"
                )
            if view.get_dtype() not in DTYPES:
                raise BadArgument(
                    f"{name} in {self.path} is {view.get_dtype()}; one of {', '.join(DTYPES)} is supported"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors.get_tensor(name)


def read_spec(path: str | Path) -> AdapterSpec:
    """Return rank, alpha and targets of an adapter directory. Raises BadArgument as `AdapterFile` does."""
    return _spec(_read_config(Path(path)), Path(path) / CONFIG)


def configured_spec(lora: LoraConfig) -> AdapterSpec | None:
    """Return the form of the adapter that `lora` asks for, that of `lora.init` if given; None if weights are trained.

    Raises BadArgument as `AdapterFile` does.
    """
    return read_spec(lora.init) if lora.init else adapter_spec(lora)


def save_adapter(
    named_tensors: Iterable[tuple[str, torch.Tensor]], spec: AdapterSpec, base: str | Path, path: str | Path
) -> None:
    """Write an adapter of the Hugging Face model `base`: tensors by PEFT's names from the iterator, of one dtype.

    Holds one tensor in memory at a time. `path` is complete afterwards or does not exist. Raises BadArgument if `path`
    exists already, RunError if a tensor is missing, unexpected or mis-shaped.
    """
    shapes = adapter_shapes(Architecture.from_pretrained(base), spec)
    with staged(path) as directory:
        (directory / CONFIG).write_text(json.dumps(peft_config(spec, base), indent=2) + "\n", encoding="utf-8")
        write_tensors(directory, named_tensors, shapes, single=WEIGHTS)


def peft_config(spec: AdapterSpec, base: str | Path) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "target_modules": list(spec.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise BadArgument(f"{path} holds no {CONFIG}, so it is not an adapter in PEFT's format")
    return read_json_object(file)


def _spec(config: dict[str, Any], file: Path) -> AdapterSpec:
    """Return the adapter that `config` describes, or raise a BadArgument that names `file` and the key."""
    if str(config.get("peft_type")).upper() != "LORA":
        raise BadArgument(f"{file} describes peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key, value in config.items():
        if key not in _HARMLESS and value and value != "none":
            raise BadArgument(f"{file} sets {key} to {value!r}, which is not supported: only plain LoRA without it is")
    if config.get("init_lora_weights", True) not in _SAME_BASE:
        raise BadArgument(
            f"{file} sets init_lora_weights to {config['init_lora_weights']!r}, which changes the base model; only an "
            "adapter of the unchanged model is supported"
        )
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or rank < 1:
        raise BadArgument(f"{file} has r = {rank!r}; it must be a positive integer")
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise BadArgument(f"{file} has lora_alpha = {alpha!r}; it must be a positive number")
    targets = list(TARGETS) if targets == "all-linear" else targets
    if not isinstance(targets, list) or not targets or not set(map(str, targets)) <= set(TARGETS):
        raise BadArgument(
            f"{file} has target_modules = {targets!r}; a list of names among {', '.join(TARGETS)} is supported"
        )
    return AdapterSpec(rank, float(alpha), tuple(targets))
