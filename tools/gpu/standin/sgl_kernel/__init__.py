"""The few functions of SGLang's compiled kernels that a dense Qwen3 calls, in plain torch; all others raise on a call.

SGLang 0.5.23's own kernels are built against a newer torch than the GPU machine's. tools/gpu/loop.py puts this package
on the path where they are missing. It is slow, and serves only to see SGLang and the engine share a GPU.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import ClassVar

import torch


def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    """Return x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""
    x = input.float()
    result = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(input.dtype) * weight
    return result if out is None else out.copy_(result)


def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
    """Compute residual += input; input = rmsnorm(residual), in place."""
    residual.add_(input)
    rmsnorm(residual, weight, eps, out=input)


def silu_and_mul(input, out=None):
    """Return silu(first half) * second half, along the last dimension."""
    gate, up = input.chunk(2, -1)
    result = torch.nn.functional.silu(gate) * up
    return result if out is None else out.copy_(result)


class _Refusing(ModuleType):
    """A module, or a name in one, whose names are all like itself, and that raises NotImplementedError if called."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str):
        return _refusing(self.__name__, name)

    def __call__(self, *_, **__):
        raise NotImplementedError(f"{self.__name__} was called, but only a stand-in for SGLang's kernels is installed")


def _refusing(module: str, name: str) -> _Refusing:
    if name.startswith("__"):  # inspect and importlib look these up and accept that they are missing
        raise AttributeError(name)
    return _Refusing(f"{module}.{name}")


def __getattr__(name: str):
    return _refusing(__name__, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder that answers the import of every submodule of this package."""

    def find_spec(self, name, path=None, target=None):
        inside = name.startswith(__name__ + ".")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec):
        return _Refusing(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
