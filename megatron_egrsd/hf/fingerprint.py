"""A hash of a model's weights, to tell whether an adapter belongs to them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_egrsd.hf.byte_ranges import THREADS, Range, pieces
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
        for name, digest in zip(names, readers.map(_digest, ranges), strict=True):
            whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _digest(where: Range) -> str:
    digest = hashlib.sha256()
    for piece in pieces([where], torch.uint8, torch.uint8):
        digest.update(piece)
    return digest.hexdigest()
