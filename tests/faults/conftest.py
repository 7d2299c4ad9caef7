"""Faults are injected into real servers, ranks and files. Set FAULT_SEED for other random moments."""

import os
import random

import psutil
import pytest

from tests.processes import abandoned, shared_memory
from tests.rollout.conftest import (  # noqa: F401  fixtures
    client,
    copies,
    model,
    model_directory,
    servers,
    shared_servers,
    wait_until,
)


@pytest.fixture
def chance(request) -> random.Random:
    """Random numbers of this test; the output of a failure contains the seed."""
    seed = f"{os.environ.get('FAULT_SEED', '0')}/{request.node.name}"
    print(f"FAULT_SEED and test: {seed}")
    return random.Random(seed)


@pytest.fixture
def nothing_left():
    """Check that no process of this test outlives it, and no unused shared memory of SGLang or torch."""
    before = shared_memory()
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in children and _runs(p)]
    assert not left, left
    assert wait_until(lambda: not abandoned(shared_memory() - before), 10), shared_memory() - before


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
