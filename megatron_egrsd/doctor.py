"""The state of the software stack: the version of each piece, and the loss of function if it is missing."""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple


class Piece(NamedTuple):
    """A piece of the stack: a function that returns its version (None: missing), and the loss without it."""

    name: str
    version: Callable[[], str | None]
    cost: str
    required: bool = False  # for training on CPU, the path of `make demo`


def _package(name: str, module: str | None = None) -> Callable[[], str | None]:
    """Return a function for the version of a distribution whose module can be found; it imports nothing heavy."""

    def version() -> str | None:
        if importlib.util.find_spec(module or name.replace("-", "_")) is None:
            return None
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "installed"

    return version


def _python() -> str | None:
    return platform.python_version() if sys.version_info >= (3, 11) else None


def _megatron() -> str | None:
    found = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    return importlib.metadata.version("megatron-core") if found else None


def _cuda() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(sorted(names))}"


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.split("release ")[1] for line in out.splitlines() if "release " in line), "installed")


def _kernels() -> str | None:
    """Return the state of the kernels of csrc/, built by setup.py. A library that does not load counts as missing."""
    try:
        from megatron_egrsd.vocab_parallel import kernels
    except (ImportError, OSError):  # torch itself may be missing
        return None
    return None if kernels.WHY_NOT else "CPU and CUDA" if kernels.HAS_CUDA else "CPU"


PIECES = [
    Piece("Python", _python, "3.11 or newer is needed", required=True),
    Piece("torch", _package("torch"), "nothing runs; install requirements/cpu.txt or gpu.txt", required=True),
    Piece("megatron-core", _megatron, "no training", required=True),
    Piece("SGLang", _package("sglang"), "no rollouts, so no training and no evaluation", required=True),
    Piece("transformers", _package("transformers"), "no tokenizer, no Hugging Face checkpoints", required=True),
    Piece("safetensors", _package("safetensors"), "no Hugging Face checkpoints", required=True),
    Piece("jsonargparse", _package("jsonargparse"), "no configuration can be read", required=True),
    Piece("rich", _package("rich"), "no console", required=True),
    Piece("tensorboard", _package("tensorboard"), "no event files; training needs it", required=True),
    Piece("matplotlib", _package("matplotlib"), "no plots; training draws one at its end", required=True),
    Piece("psutil", _package("psutil"), "saving a distributed checkpoint hangs", required=True),
    *(
        Piece(name, _package(name), "training imports it", required=True)
        for name in ("numpy", "pebble", "aiohttp", "httpx", "jinja2", "markupsafe", "orjson", "tokenizers")
    ),
    Piece("pyyaml", _package("pyyaml", "yaml"), "no configuration can be read", required=True),
    Piece("math-verify", _package("math-verify"), 'no reward "math"; own rewards by import path still work'),
    Piece("sympy", _package("sympy"), "no math-verify"),
    Piece("datasets", _package("datasets"), "no problems from the hub; .jsonl files still work"),
    Piece("pyarrow", _package("pyarrow"), "no .parquet files, no datasets; .jsonl files still work"),
    Piece("docstring-parser", _package("docstring-parser"), "no meaning of a key in --help"),
    Piece("wandb", _package("wandb"), "no logging.wandb; the other logs do not need it"),
    Piece("CUDA", _cuda, "training and rollouts run on the CPU: for tiny models only"),
    Piece("nvcc", _nvcc, "our CUDA kernels cannot be built"),
    Piece("our kernels", _kernels, "log-prob and entropy in plain torch: slower, more memory, same numbers"),
    Piece("transformer-engine", _package("transformer-engine"), "megatron-core's local layers: slower on a GPU"),
    Piece(
        "apex",
        lambda: "NVIDIA's" if importlib.util.find_spec("amp_C") else None,
        "torch's norms and Adam instead of fused ones (PyPI's apex is another project)",
    ),
]


def run_doctor() -> int:
    """Print the stack; returns 0 if training can run at least on the CPU, else 1."""
    missing = []
    for piece in PIECES:
        try:
            version = piece.version()
        except Exception as error:  # a broken install must not hide the rest of the list
            version = None
            print(f"  {piece.name}: {type(error).__name__}: {error}")
        if version:
            print(f"  ok       {piece.name:<20} {version}")
        else:
            missing += [piece.name] if piece.required else []
            print(f"  {'MISSING' if piece.required else 'without':<8} {piece.name:<20} {piece.cost}")
    if missing:
        print(f"\nTraining cannot run: install {', '.join(missing)} (make install).")
        return 1
    print("\nTraining can run" + (" on the GPU." if _cuda() else " on the CPU: try `make demo`."))
    return 0
