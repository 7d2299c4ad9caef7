"""A hash of a model's weights, to tell whether an adapter belongs to them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_egrsd.hf.byte_ranges import THREADS, Range, digest, pieces
from megatron_egrsd.hf.checkpoint import HFCheckpoint


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of the architecture and weights at `path`, in whatever files they lie; reads all of them."""
    checkpoint = HFCheckpoint(path)
    names = checkpoint.names()
    ranges = [checkpoint.range(name) for name in names]
    arch = checkpoint.architecture
    whole = hashlib.sha256(repr(arch).encode())
    if arch.rope_scaling:
        whole.update(repr(arch.rope_scaling).encode())
    with ThreadPoolExecutor(THREADS) as readers:
        for name, sha256 in zip(names, readers.map(_digest, ranges), strict=True):
            whole.update(f"{name} {sha256}\n".encode())
    return whole.hexdigest()


def _digest(where: Range) -> str:
    return digest(pieces([where], torch.uint8, torch.uint8))
