"""A child process that answers requests: started by the first one, replaced if it has ended, gone with its parent."""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any

from megatron_egrsd.errors import RunError
from megatron_egrsd.system import import_path

START_SECONDS = 120  # for the child's imports on a busy machine


class WorkerProcess:
    """A function of bytes that runs in a child process. Any thread may call `ask`; requests wait for each other.

    The child ends if this process ends for any reason, because its connection closes.

    Args:
        target: Import path (import_path.py). The child calls it once, without arguments, and gives each request to the
            function that it returns. An exception of that function ends the child.
        package: The package that the child needs; the message of a failed start names it.
        popen: Further arguments of subprocess.Popen.
    """

    def __init__(self, target: str, package: str, **popen: Any):
        self.target, self.package, self.popen = target, package, popen
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None  # to the process
        self.owner = 0  # a fork of this process inherits the child, and may neither use nor end it
        atexit.register(self.close)

    def ask(self, request: bytes, seconds: float | None = None) -> bytes | None:
        """Return the answer, or None if the child ended or took longer than `seconds`, which ends it.

        Raises RunError if the child does not start.
        """
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self._start()
            with contextlib.suppress(OSError):  # it ended after the check; _receive returns None then
                self.connection.send_bytes(request)
            return self._receive(seconds)

    def close(self) -> None:
        """End the child, unless another process started it. Idempotent."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.connection.close()
            self.process = None

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
        ours, theirs = socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), self.target]
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], **self.popen
            )
        self.connection, self.owner = Connection(ours.detach()), os.getpid()
        if self._receive(START_SECONDS) is None:
            check = f"python -c 'import {self.package}'"
            raise RunError(f"the process for {self.target} does not start; check `{check}`")

    def _receive(self, seconds: float | None) -> bytes | None:
        with contextlib.suppress(OSError, EOFError):
            if self.connection.poll(seconds):  # select() is limited to 1,024 files, which a busy client exceeds
                return self.connection.recv_bytes()
        self.close()
        return None


def main() -> None:
    """Answer requests in the child until the connection closes: `worker_process FILE_DESCRIPTOR TARGET`."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the signals are meant for the parent, which still awaits answers
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    answer = import_path.load(sys.argv[2], "worker_process")()
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(b"ready")
        while True:
            connection.send_bytes(answer(connection.recv_bytes()))


if __name__ == "__main__":
    main()
