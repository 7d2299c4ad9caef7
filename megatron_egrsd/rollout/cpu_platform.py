"""SGLang on a machine without a GPU: plain PyTorch, without AMX and without SGLang's compiled kernels.

SGLang finds `activate` through the entry-point group "sglang.srt.platforms" (pyproject.toml) in every process it
starts. `SGLANG_PLATFORM` = `NAME` selects it. `CpuPlatform.init_backend` replaces what SGLang has no setting for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.platforms.interface import SRTPlatform

NAME = "megatron_egrsd_cpu"


def activate() -> str | None:
    """Return the import path of the platform class, or None if CUDA is available: SGLang's own platform serves then."""
    import torch

    return None if torch.cuda.is_available() else f"{__name__}.CpuPlatform"


def __getattr__(name: str) -> "type[SRTPlatform]":
    """Define `CpuPlatform` on demand: SGLang imports this module before its own platforms are complete."""
    if name != "CpuPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class CpuPlatform(CpuDeviceMixin, SRTPlatform):
        _enum = PlatformEnum.OOT  # CPU proper would select AMX kernels that torch's plain build does not have
        device_name = "cpu"
        device_type = "cpu"

        def apply_server_args_defaults(self, server_args):
            from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices

            add_deterministic_attention_backend_choices([NAME])
            if server_args.attention_backend in (None, "intel_amx"):  # not given: SGLang filled in AMX for "cpu"
                server_args.attention_backend = NAME

        def get_default_attention_backend(self):
            return NAME

        def init_backend(self):
            from sglang.srt.batch_invariant_ops import batch_invariant_ops
            from sglang.srt.layers import sampler
            from sglang.srt.layers.attention.attention_registry import register_attention_backend

            from megatron_egrsd.rollout.cpu_memory import use_pageable_memory
            from megatron_egrsd.rollout.cpu_sampling import multinomial_with_seed

            use_pageable_memory()
            # On CPU, deterministic inference means seeded sampling only; the batch-invariant kernels are for GPUs.
            batch_invariant_ops._batch_invariant_MODE = True
            sampler.multinomial_with_seed = multinomial_with_seed

            @register_attention_backend(NAME)
            def batched_decode(runner):
                from megatron_egrsd.rollout.cpu_attention import BatchedDecodeBackend

                return BatchedDecodeBackend(runner)

        def is_pin_memory_available(self, device=None):
            return False

        def get_dispatch_key_name(self):
            return "native"

    globals()[name] = CpuPlatform
    return CpuPlatform
