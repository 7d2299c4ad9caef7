"""SIGTERM, the way schedulers announce that they take a machine back: any rank that gets it stops the whole run.

A rank waiting in a collective runs no Python, so no ordinary signal handler. Here the interpreter's C handler writes
the signal's number into a pipe, a thread reads it and tells the job's store, and the first rank asks there.
"""

import os
import signal
import threading
from datetime import timedelta

import torch.distributed as dist

from megatron_egrsd.errors import Preempted
from megatron_egrsd.system import torchrun

_PATIENCE = timedelta(seconds=30)  # for the store to answer


class Preemption:
    """Notes SIGTERM while it is open. Made on the main thread."""

    def __init__(self):
        self.requested = False
        self._key = f"megatron_egrsd/preempted/{torchrun.restart_count()}"
        self._store = None
        if torchrun.world_size() > 1:
            address, port = torchrun.master()
            # A connection of its own: torch's store is busy whenever a rank waits for another one there.
            self._store = dist.TCPStore(address, port, None, False, _PATIENCE)

    def __enter__(self) -> "Preemption":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        os.close(self._writer)  # ends the thread, which closes the other end

    def _listen(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] != signal.SIGTERM or self.requested:  # torchrun repeats what a scheduler sent to everybody
                continue
            self.requested = True
            if self._store is not None:
                self._store.set(self._key, "1")
        os.close(reader)

    def check(self) -> None:
        """Raise Preempted if this or any other rank has got SIGTERM. Cheap; never waits."""
        if self.requested or (self._store is not None and self._store.check([self._key])):
            raise Preempted("stopped by SIGTERM")
