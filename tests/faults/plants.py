"""Functions that a copy of tests/copies.py calls before anything else: faults of the machine, and faults of the code.

The soak (soak.py) breaks the machine with some of them, and its tests (test_soak.py) the code with the others.
"""

import contextlib
import ctypes
import os
import random
import resource
import shutil
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

SEED, HANDLES, NAMESPACE = "SOAK_SEED", "SOAK_HANDLES", "SOAK_NAMESPACE"  # environment variables
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)


def _is_rank() -> bool:
    return sys.argv[0] == "megatron_egrsd.cli"


def few_handles() -> None:
    """Let a rank, and what it starts, open few files."""
    if _is_rank():
        limit = int(os.environ[HANDLES])
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def clock_jumps() -> None:
    """Let a rank's wall clock jump at a random moment, forwards or backwards, by minutes or by days."""
    if not _is_rank():
        return
    chance, real = random.Random(os.environ[SEED] + os.environ.get("RANK", "")), time.time
    offset = chance.choice([-1, 1]) * chance.choice([90.0, 3600.0, 86400.0])
    jump = time.monotonic() + chance.uniform(0, 4)
    time.time = lambda: real() + offset * (time.monotonic() > jump)


def on_the_second_host() -> None:
    """Move rank 1 into the network namespace of the second host; let both reach torchrun through the cable."""
    if _is_rank():
        os.environ["MASTER_ADDR"] = os.environ[f"{NAMESPACE}_MASTER"]
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ[f"{NAMESPACE}_CABLE_{os.environ['RANK']}"]
        if os.environ["RANK"] == "1":
            with open(f"/run/netns/{os.environ[NAMESPACE]}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NETWORK):
                    raise OSError(ctypes.get_errno(), "setns")


# -- faults of the code, which the soak must find ---------------------------------------------------------------------


def rename_early() -> None:
    """Give a checkpoint its final name before it is complete."""
    from megatron_egrsd.engine import checkpoint

    save = checkpoint.dist_checkpointing.save

    def saved(state, partial: str, **options):
        final = Path(partial).with_suffix("")
        final.mkdir()
        (final / "metadata.json").write_text("{}")
        time.sleep(2)
        request = save(state, partial, **options)
        shutil.rmtree(final)
        return request

    checkpoint.dist_checkpointing.save = saved


def keep_the_lock() -> None:
    """Lock with a file that a killed run leaves."""
    from megatron_egrsd.errors import BadArgument
    from megatron_egrsd.run import session

    @contextlib.contextmanager
    def locked(directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / ".taken"
        if file.exists():
            raise BadArgument(f"another run is writing {directory}")
        file.touch()
        yield
        file.unlink()

    session.locked = locked


def wait_for_ever() -> None:
    """Let no collective end by its timeout."""
    from megatron_egrsd.engine import distributed

    distributed.timedelta = lambda **_: timedelta(days=1)


def train_twice() -> None:
    """Log a step a second time."""
    from megatron_egrsd.run.log import RunLog

    step = RunLog.step

    def twice(self, values) -> None:
        step(self, values)
        if values["step"] == 3:
            step(self, values)

    RunLog.step = twice


def leave_a_process() -> None:
    """Let a rank start a process that outlives it."""
    if _is_rank() and not os.fork():
        os.setsid()
        threading.Event().wait(600)
