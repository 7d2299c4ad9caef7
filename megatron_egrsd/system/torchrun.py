"""torchrun's environment variables; without them the process is the only one of its job."""

import os
import socket

# They describe the training job: a process that is started for something else must not see them.
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
)


def is_launched() -> bool:
    """Return whether torchrun started this process."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the rank within this node, 0 for the node's first process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of this node's processes."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restart_count() -> int:
    """Return how often torchrun has restarted the job's processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def master() -> tuple[str, int]:
    """Return the address and port of the job's store. Raises KeyError if torchrun did not start this process."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def has_ended() -> bool:
    """Return whether torchrun has ended before this process could reach it.

    Its store is there before its first process is, so nobody listening means that it is gone: interrupted while it
    started them. torch would try to connect for twice its timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False  # rank 0 makes the store, and may come last
    try:
        socket.create_connection(master(), timeout=10).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass  # out of reach, which torch reports
    return False


def environment_without() -> dict[str, str]:
    """Return a copy of the environment without torchrun's variables."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}
