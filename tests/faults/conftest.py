"""Faults are injected into real servers, ranks and files. Set FAULT_SEED for other random moments."""

import contextlib
import os
import random
from pathlib import Path

import psutil
import pytest

from tests.rollout.conftest import client, copies, model, model_directory, servers, wait_until  # noqa: F401  fixtures


@pytest.fixture
def chance(request) -> random.Random:
    """Random numbers of this test; the output of a failure contains the seed."""
    seed = f"{os.environ.get('FAULT_SEED', '0')}/{request.node.name}"
    print(f"FAULT_SEED and test: {seed}")
    return random.Random(seed)


@pytest.fixture
def nothing_left():
    """Check that no process of this test outlives it, and no unused shared memory of SGLang or torch."""
    before = _shared_memory()
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in children and _runs(p)]
    assert not left, left
    # Tests that run beside this one create and end theirs meanwhile.
    assert wait_until(lambda: not _abandoned(_shared_memory() - before), 10), _shared_memory() - before


def _abandoned(names: set[str]) -> set[str]:
    """Return which of these no process of this machine has mapped."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text()
            names = {name for name in names if name not in text}
    return names


def _shared_memory() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(("sgl", "torch", "nccl", "psm"))}


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
