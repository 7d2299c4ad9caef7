"""Protection against orphaned servers: the kernel ends a server's processes when the process that started them ends."""

import ctypes
import os
import signal

PARENT_VARIABLE = "MEGATRON_EGRSD_SERVER_PARENT"  # process id of the parent of the process that reads it
KEY_VARIABLE = "MEGATRON_EGRSD_SERVER_KEY"  # the API key of a launched server, hidden from `ps`
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends (prctl(2)); exit if the parent has already ended.

    Every process of a server calls this: the end of the trainer ends the HTTP server, whose end ends its children. The
    "parent" of prctl is a thread: start servers from a thread that lives as long as they should. Does nothing if
    PARENT_VARIABLE is not set: the user has started the server by hand.
    """
    if PARENT_VARIABLE not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):  # the parent ended before the call of prctl
        os._exit(1)
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the children of this process
