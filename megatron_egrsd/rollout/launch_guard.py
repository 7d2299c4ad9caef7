"""A server's processes end with the process that started them, however that one ends: the kernel sees to it."""

import ctypes
import os
import signal

PARENT_VARIABLE = "MEGATRON_EGRSD_SERVER_PARENT"  # id of the process that starts the one that reads it
KEY_VARIABLE = "MEGATRON_EGRSD_SERVER_KEY"  # the API key of a launched server, unseen by `ps`
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends (prctl(2)); end here if that has already happened.

    Each process of a server calls this, so that a killed trainer takes the HTTP server, and that its children. The
    "parent" of prctl is a thread: start servers from one that lives as long as they should. A server that a user starts
    by hand, without PARENT_VARIABLE, is left alone.
    """
    if PARENT_VARIABLE not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):  # it ended before prctl could notice
        os._exit(1)
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the children of this process
