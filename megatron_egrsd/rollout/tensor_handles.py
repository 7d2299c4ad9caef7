"""Tensors shared with servers of this host by handle: CUDA IPC on GPUs, shared memory on CPU.

The message is a pickle in torch.multiprocessing's format, which SGLang reads with an allow-list of harmless types. It
holds addresses, not contents: a few kilobytes for any model.
"""

import base64
import io
import shutil
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing as torch_mp

from megatron_egrsd.errors import RunError

Bucket = list[tuple[str, torch.Tensor]]
_SHARED_MEMORY = "/dev/shm"


def flatten(bucket: Bucket, device: torch.device) -> torch.Tensor:
    """Copy the tensors of a bucket, which have one dtype, into one new tensor [elements] on `device`."""
    return torch.cat([t.detach().to(device).reshape(-1) for _, t in bucket])


def unflatten(flat: torch.Tensor, bucket: Bucket) -> Bucket:
    """Return `bucket`'s names with views of `flat`, which is laid out like `flatten(bucket)`."""
    parts = flat.split([t.numel() for _, t in bucket])
    return [(name, part.view(t.shape)) for (name, t), part in zip(bucket, parts, strict=True)]


def share(bucket: Bucket, device: torch.device, form: type = list) -> tuple[str, torch.Tensor]:
    """Return (handles of `bucket` in base64, the buffer behind them). Keep the buffer until the servers have answered.

    The receiver gets a `form` of names and tensors: a list of pairs or a dict. The tensors, which have one dtype, are
    copied into one buffer on `device` that other processes can open. Raises RunError if the host's shared memory is too
    small: the kernel would kill the process that writes to it.
    """
    size, free = sum(t.nbytes for _, t in bucket), shutil.disk_usage(_SHARED_MEMORY).free
    if device.type == "cpu" and size > free:
        what = "a weight bucket" if form is list else "an adapter"
        lower = "lower rollout.sync.bucket_mib, or " * (form is list)  # an adapter goes as a whole
        raise RunError(f"{_SHARED_MEMORY} has {free >> 20} MiB left for {what} of {size >> 20} MiB; {lower}give the "
                       "container more (docker run --shm-size)")  # fmt: skip
    flat = flatten(bucket, device)
    # By file name: a file descriptor can only be passed on to a child process.
    strategy = torch_mp.get_sharing_strategy()
    torch_mp.set_sharing_strategy("file_system")
    try:
        pickled = io.BytesIO()
        ForkingPickler(pickled).dump(form(unflatten(flat, bucket)))
    finally:
        torch_mp.set_sharing_strategy(strategy)
    return base64.b64encode(pickled.getvalue()).decode(), flat
