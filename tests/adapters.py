"""Small random adapters for tests."""

from pathlib import Path

import torch

from megatron_egrsd.hf.adapter_file import save_adapter
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_shapes
from megatron_egrsd.hf.architecture import Architecture


def random_adapter(
    path: Path, base: Path, spec: AdapterSpec, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write an adapter of `base` that changes the model visibly, A and B alike, and return `path`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(Architecture.from_pretrained(base), spec)
    tensors = ((name, (0.2 * torch.randn(s, generator=generator)).to(dtype)) for name, s in shapes.items())
    save_adapter(tensors, spec, base, path)
    return path
