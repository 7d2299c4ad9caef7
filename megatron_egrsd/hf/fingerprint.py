"""A hash of a model's weights, to tell whether an adapter belongs to them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_egrsd.hf.byte_ranges import digest, in_threads, pieces
from megatron_egrsd.hf.checkpoint import HFCheckpoint


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of the architecture and weights at `path`, in whatever files they lie; reads all of them."""
    checkpoint = HFCheckpoint(path)
    names = checkpoint.names()
    ranges = {name: checkpoint.range(name) for name in names}
    digests = {}

    def read(name: str) -> Iterator[int]:
        digests[name] = digest(pieces([ranges[name]], torch.uint8, torch.uint8))
        yield 0

    in_threads(map(read, names), lambda nbytes: None)
    arch = checkpoint.architecture
    whole = hashlib.sha256(repr(arch).encode())
    if arch.rope_scaling:
        whole.update(repr(arch.rope_scaling).encode())
    for name in names:
        whole.update(f"{name} {digests[name]}\n".encode())
    return whole.hexdigest()
