"""Run megatron-core 0.19 on CPU and gloo. Does nothing if CUDA is available.

megatron-core names the CUDA device in places where no configuration reaches: the current device, device="cuda" in
factory calls, type names such as "torch.cuda.FloatTensor", the random states of its tensor-parallel tracker. Each is
answered here with its CPU counterpart; no call that works without CUDA changes its meaning. Rotary embeddings of packed
rows, which Transformer Engine's kernel does on GPUs, are applied to all sequences at once. Modules that need more than
an answer (norms, attention) are replaced through ModuleSpec in layers.py instead.
"""

import contextlib
import functools
import sys
import types

import torch
import torch.utils._device

from megatron_egrsd.data.zigzag import zigzag


def install() -> None:
    """Answer megatron-core's CUDA calls on the CPU. Idempotent; must run before megatron.core is imported."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_megatron_egrsd_cpu", False):
        return
    torch.cuda._megatron_egrsd_cpu = True
    cpu = torch.device("cpu")
    event = types.SimpleNamespace(synchronize=lambda: None)
    stream = types.SimpleNamespace(
        wait_event=lambda event: None, wait_stream=lambda stream: None, record_event=lambda: event
    )
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: stream
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # `with torch.device(...)` knows factories by identity: let it meet the originals before our wrappers.
    torch.utils._device._device_constructors()
    for name in ("zeros", "ones", "empty", "full", "tensor", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)

    import megatron.core.tensor_parallel.random as tracker
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import token_dispatcher

    rope_utils._apply_rotary_pos_emb_thd = _all_sequences_at_once(rope_utils._apply_rotary_pos_emb_thd)

    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = stream  # else it makes a CUDA stream
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host
    tracker._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _on_cpu(factory):
    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


def _all_sequences_at_once(apply):
    """Give megatron-core's rotary embedding of packed rows, which loops over the sequences, every token's own angles.

    If angles [T, 1, 1, D] come for all T tokens, it takes them as they are, in one go.
    """
    alone = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    @functools.wraps(apply)
    def wrapper(t, cu_seqlens, freqs, *args, cp_group, **kwargs):
        places = zigzag(cu_seqlens, cp_group.rank(), cp_group.size())
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        # One sequence of one rank to megatron-core, whose slices are then the whole.
        bounds = torch.tensor([0, t.shape[0]])
        return apply(t, bounds, freqs[places - starts[places]], *args, cp_group=alone, **kwargs)

    return wrapper


def _on_host(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Return `tensor`, as numpy if asked: megatron-core leaves split sizes alone that are on the host already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _cuda_type_name(tensor_type):
    """Wrap Tensor.type() to answer as megatron-core's optimizers compare it, and all other callers as torch does."""

    def wrapper(self, *args, **kwargs):
        name = tensor_type(self, *args, **kwargs)
        if not args and not kwargs and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    return wrapper
