"""SGLang's host memory on a machine without a GPU: of LoRA (`--lora-backend torch_native`), and of routed experts.

SGLang pins it without asking the platform, and torch refuses to pin without a GPU. There is nothing to copy to, so the
memory stays as it is.
"""

import torch


class _Unpinned:
    """The torch module, of which `tensor` and `zeros` ignore `pin_memory`."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def tensor(*args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)

    @staticmethod
    def zeros(*args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)


def use_pageable_memory() -> None:
    """Let SGLang's LoRA layers, its torch backend and its host caches run without pinned memory. For this process."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend
    from sglang.srt.mem_cache.pool_host import common

    layers.torch = torch_backend.torch = _Unpinned()
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    common.ALLOC_MEMORY_FUNCS["cpu"] = lambda dims, dtype, device, **_: torch.empty(dims, dtype=dtype, device=device)
