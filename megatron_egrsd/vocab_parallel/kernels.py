"""The compiled row kernels of `csrc/`, called on tensors: checks, addresses, results. No torch is compiled into them.

An op that mutates a tensor tells autograd so, as torch's own do: a second backward pass, and a second consumer of the
overwritten logits, raise.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_egrsd.vocab_parallel.rows import RowLayout, row_layout
from megatron_egrsd.vocab_parallel.shard import LOGIT_DTYPES, Shard

INTERFACE = 1  # of the compiled module; csrc/bind/module.cpp has the same number
_REASON_FILE = Path(__file__).with_name("_not_built.txt")  # written by setup.py
DTYPES = {dtype: i for i, dtype in enumerate(LOGIT_DTYPES)}  # the order of Dtype in csrc/common/logits.h


def load(name: str = "megatron_egrsd.vocab_parallel._kernels") -> tuple[Any, str]:
    """Return (module of the compiled kernels, "") or (None, the reason why there is none). Never raises."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None, _not_built()
    except Exception as error:  # a file for another processor, a truncated one, a missing library: all must fall back
        return None, f"built, but not loaded: {error}"
    if getattr(module, "interface", None) != INTERFACE:
        return None, f"{module.__file__} was built from another version of the sources"
    return module, ""


def _not_built() -> str:
    return f"not built: {_REASON_FILE.read_text(encoding='utf-8').strip()}" if _REASON_FILE.exists() else "not built"


native, WHY_NOT = load()  # WHY_NOT is "" if there are kernels
HAS_CUDA = hasattr(native, "cuda_statistics")


def why_not(device_type: str) -> str:
    """Return the reason why there are no kernels for `device_type`."""
    if WHY_NOT or device_type != "cuda":
        return WHY_NOT or "written for CPU and CUDA only"
    return _not_built()


class Gradients(NamedTuple):
    """Gradients of the results, each [N] fp32; None stands for zeros."""

    log_prob: torch.Tensor | None
    entropy: torch.Tensor | None = None
    log_normalizer: torch.Tensor | None = None


def available(device: torch.device) -> bool:
    return native is not None and (device.type == "cpu" or (device.type == "cuda" and HAS_CUDA))


def instruction_set() -> str:
    """Return the name of the CPU kernels in use."""
    return native.instruction_set()


def statistics(
    logits: torch.Tensor, target_N: torch.Tensor | None, shard: Shard, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Return the statistics [N, 4] fp32 of this shard's columns of logits [..., V]."""
    described = _logits(logits, target_N, shard, temperature)
    return sum_rows(logits, "statistics", described, valid=shard.valid, floats=4)


def combine(parts_RN4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge statistics [R, N, 4]: return their union [N, 4], log p(target), entropy and log-normaliser, each [N]."""
    parts_RN4 = parts_RN4.contiguous()
    ranks, rows, _ = parts_RN4.shape
    whole_N4 = torch.empty((rows, 4), dtype=torch.float32, device=parts_RN4.device)
    results = [torch.empty(rows, dtype=torch.float32, device=parts_RN4.device) for _ in range(3)]
    parts = address(parts_RN4, "parts", 4 * ranks * rows, parts_RN4.device)
    call(parts_RN4, "combine", parts, ranks, rows, whole_N4.data_ptr(), *(x.data_ptr() for x in results))
    return whole_N4, *results


def logits_grad(
    logits: torch.Tensor,
    target_N: torch.Tensor | None,
    statistics_N4: torch.Tensor,
    gradients: Gradients,
    shard: Shard,
    temperature: float | torch.Tensor,
    *,
    inplace: bool,
) -> torch.Tensor:
    """Return the gradient with respect to the logits, in their shape and dtype; `inplace` writes it over them."""
    described = _logits(logits, target_N, shard, temperature)
    rows, device = count_rows(logits), logits.device
    out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    log_prob_N = torch.zeros_like(statistics_N4[:, 0]) if gradients.log_prob is None else gradients.log_prob
    gradient = native.Gradient(
        out.data_ptr(), *row_layout(out)[1:], address(statistics_N4, "statistics", 4 * rows, device),
        address(log_prob_N, "grad_log_prob", rows, device),
        address(gradients.entropy, "grad_entropy", rows, device),
        address(gradients.log_normalizer, "grad_log_normalizer", rows, device),
    )  # fmt: skip
    call(logits, "logits_grad", described, gradient, *threads(logits))
    if inplace:
        torch.autograd.graph.increment_version(logits)
    return out


def read_floor(memory: torch.Tensor) -> None:
    """Read `memory` once over the threads of the kernels, for the benchmark. CPU only."""
    native.read_floor(memory.data_ptr(), memory.nbytes, torch.get_num_threads())


def read_write_floor(memory: torch.Tensor) -> None:
    """Read and write `memory` once over the threads of the kernels, for the benchmark. CPU only."""
    native.read_write_floor(memory.data_ptr(), memory.nbytes, torch.get_num_threads())
    torch.autograd.graph.increment_version(memory)


def count_rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def sum_rows(x: torch.Tensor, name: str, *described: Any, valid: int, floats: int) -> torch.Tensor:
    """Call the kernel `name` that sums over the `valid` columns of `x` [..., V], and return its [N, floats] fp32."""
    rows, division = count_rows(x), threads(x)
    out = x.new_empty((rows, floats), dtype=torch.float32)
    if x.is_cuda:
        splits = native.cuda_splits(rows, valid, x.get_device())
        workspace = x.new_empty((rows * splits if splits > 1 else 0, floats), dtype=torch.float32)
        division = splits, workspace.data_ptr()
    call(x, name, *described, *division, out.data_ptr())
    return out


def threads(x: torch.Tensor) -> tuple[int, ...]:
    """Return the argument that only kernels for the CPU take."""
    return () if x.is_cuda else (torch.get_num_threads(),)


def call(x: torch.Tensor, name: str, *arguments: Any) -> None:
    """Call the kernel `name` for the device of `x`, a CUDA one on its current stream."""
    if not x.is_cuda:
        getattr(native, name)(*arguments)
        return
    function, device = getattr(native, f"cuda_{name}"), x.get_device()
    if device == torch.cuda.current_device():
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)
        return
    with torch.cuda.device(device):
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)


def layout_of(logits: torch.Tensor, shard: Shard) -> RowLayout:
    """Return where the rows of logits [..., V] lie; raises ValueError if the kernels would read beyond their memory."""
    layout, columns = row_layout(logits), logits.shape[-1]
    if logits.dtype not in DTYPES or layout is None or (columns > 1 and logits.stride(-1) != 1):
        raise ValueError(
            f"logits {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()} have no such rows"
        )
    if not 0 <= shard.valid <= columns:
        raise ValueError(f"{shard.valid} valid columns of {columns}")
    return layout


def _logits(logits: torch.Tensor, target_N: torch.Tensor | None, shard: Shard, temperature: float | torch.Tensor):
    """Describe logits [..., V] to the kernels; raises ValueError for what they would read beyond its memory."""
    rows, *layout = layout_of(logits, shard)
    per_token = isinstance(temperature, torch.Tensor)
    return native.Logits(
        logits.data_ptr(), DTYPES[logits.dtype], *layout, rows, logits.shape[-1], shard.valid, shard.start,
        address(target_N, "target", rows, logits.device, torch.int64),
        address(temperature, "temperature", rows, logits.device) if per_token else 0,
        1.0 if per_token else 1.0 / temperature,
    )  # fmt: skip


def address(
    x: torch.Tensor | None, name: str, numel: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> int:
    if x is None:
        return 0
    if x.dtype != dtype or x.numel() != numel or x.device != device or not x.is_contiguous():
        raise ValueError(
            f"{name} must be {numel} contiguous {dtype} on {device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    return x.data_ptr()
