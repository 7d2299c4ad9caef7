"""What torchrun tells a process through its environment; a process that it did not start is a world of one."""

import os

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
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The rank within this node: 0 is the node's first one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restart_count() -> int:
    """How often torchrun has started the job's processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def master() -> tuple[str, int]:
    """The address and port of the job's store. KeyError if torchrun did not start this process."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def environment_without() -> dict[str, str]:
    """A copy of the environment without torchrun's variables."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}
