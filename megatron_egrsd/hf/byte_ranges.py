"""Tensors as byte ranges of files, copied through one small buffer by a few threads.

A conversion moves bytes and a comparison reads them, so neither allocates a tensor: a new tensor costs a page fault
every 4 KiB, which takes longer than the copy. docs/guides/conversion.md has the numbers.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from megatron_egrsd.errors import RunError
from megatron_egrsd.system.interrupts import held_back

# 512 KiB of bf16: small enough for the cache, and large enough that the overhead of a call is negligible.
PIECE_ELEMENTS = 1 << 18
PIECE_BYTES = 1 << 19
THREADS = min(8, len(os.sched_getaffinity(0)))

# From <linux/falloc.h>: allocate without changing the file's size.
_FALLOC_FL_KEEP_SIZE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)

Advance = Callable[[int], object]  # called with the bytes done since the last call


class Range(NamedTuple):
    """`nbytes` bytes at `offset` of the file at `path`."""

    path: Path
    offset: int
    nbytes: int


def pieces(ranges: Iterable[Range], stored: torch.dtype, wanted: torch.dtype) -> Iterator[memoryview]:
    """Yield the elements of `ranges` in order, rounded from dtype `stored` to `wanted`, PIECE_ELEMENTS at a time.

    All pieces share one buffer: a piece is valid until the next is requested. Raises RunError if a file ends too early.
    """
    source = torch.empty(PIECE_ELEMENTS, dtype=stored)
    target = source if wanted == stored else torch.empty(PIECE_ELEMENTS, dtype=wanted)
    buffer, result, filled = raw_bytes(source), raw_bytes(target), 0

    def piece() -> memoryview:
        count = filled // stored.itemsize
        if target is not source:
            target[:count].copy_(source[:count])
        return result[: count * wanted.itemsize]

    with contextlib.ExitStack() as stack:
        files: dict[Path, FileIO] = {}
        for path, offset, nbytes in ranges:
            if path not in files:
                files[path] = stack.enter_context(open(path, "rb", buffering=0))
            files[path].seek(offset)
            while nbytes:
                count = files[path].readinto(buffer[filled : filled + nbytes])
                if not count:
                    raise RunError(f"{path} is truncated: it ends before byte {offset + nbytes}")
                filled, offset, nbytes = filled + count, offset + count, nbytes - count
                if filled == len(buffer):
                    yield piece()
                    filled = 0
        if filled:
            yield piece()


def digest(pieces: Iterable[memoryview]) -> str:
    """Return the SHA-256 of `pieces`, one behind the other."""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's elements as bytes. Copies the tensor only if it is not contiguous."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data` to an unbuffered file, whose own `write` may stop early: at 2 GiB, or when the disk fills."""
    view = memoryview(data)
    while view:
        view = view[file.write(view[:PIECE_BYTES]) :]


def reserve(file: BinaryIO, nbytes: int) -> None:
    """Allocate disk space for the first `nbytes` of an empty file. Raises OSError if there is not enough.

    Writing takes a fifth less time afterwards. Does nothing if the file system cannot allocate ahead:
    os.posix_fallocate would write to every block instead.
    """
    if _libc.fallocate(file.fileno(), _FALLOC_FL_KEEP_SIZE, 0, nbytes):
        reason = ctypes.get_errno()
        if reason in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(reason, os.strerror(reason))


def in_threads(tasks: Iterable[Iterator[int]], advance: Advance) -> None:
    """Run all tasks, THREADS at a time. A task yields the bytes it has done, which are passed to `advance`.

    If a task fails or the process is interrupted, every other task stops at its next yield, and the error is raised.
    """
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True

    def run(task: Iterator[int]) -> None:
        while not stopped and (nbytes := next(task, None)) is not None:
            advance(nbytes)

    with held_back(stop), ThreadPoolExecutor(THREADS) as pool:
        try:
            for future in as_completed([pool.submit(run, task) for task in tasks]):
                future.result()
        except BaseException:
            stop()
            raise
