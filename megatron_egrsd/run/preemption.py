"""SIGTERM, the way schedulers announce that they take a machine back, and Ctrl-C: either stops the whole run.

A rank waiting in a collective runs no Python, so no ordinary signal handler. Here the interpreter's C handler writes
the signal's number into a pipe, a thread reads it and tells the job's store, and rank 0 asks there.
"""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_egrsd.errors import Interrupted, Preempted
from megatron_egrsd.system import torchrun

_PATIENCE = timedelta(seconds=30)  # for the store to answer
_REPEATED = 2.0  # seconds after a Ctrl-C within which another one may be torchrun's


class Preemption:
    """Watch for SIGTERM while open, and for the first Ctrl-C from `save_on_interrupt` on. Made on the main thread."""

    def __init__(self):
        self.requested = 0  # the signal
        self._interrupted = 0.0  # when Ctrl-C came first
        self._key = f"megatron_egrsd/preempted/{torchrun.restart_count()}"
        self._store = None
        if torchrun.world_size() > 1:
            address, port = torchrun.master()
            # A connection of its own: torch's store is busy whenever a rank waits for another one there.
            self._store = dist.TCPStore(address, port, None, False, _PATIENCE)
        self._handlers: dict[int, Any] = {}  # those before, by signal
        self._wakeup = -1  # the descriptor before
        self._reader, self._writer = os.pipe()  # last, or a store that is refused would leave it open

    def __enter__(self) -> "Preemption":
        os.set_blocking(self._writer, False)
        self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._pass_on)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # ends the thread, which closes the other end

    def save_on_interrupt(self) -> None:
        """Let the first Ctrl-C stop the run as SIGTERM does, and the second end it. Until then the first ends it."""
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in a shell's background job
            self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Write what the C handler has written, unless to another pipe: uvloop puts its own in while a loop runs."""
        os.write(self._writer, bytes([number]))

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._interrupted:
            self._interrupted = now
            self._pass_on(number, frame)
            if torchrun.local_rank() == 0:
                print("interrupted: the step is finished and saved; Ctrl-C again ends at once", flush=True)
        # A terminal interrupts ranks and torchrun alike, and torchrun then interrupts the ranks, too.
        elif not torchrun.is_launched() or now - self._interrupted > _REPEATED:
            signal.default_int_handler(number, frame)

    def _listen(self, reader: int) -> None:
        while received := os.read(reader, 1):
            # torchrun repeats what a scheduler sent to everybody
            if received[0] not in self._handlers or self.requested:
                continue
            self.requested = received[0]
            if self._store is not None:
                self._store.set(self._key, str(received[0]))
        os.close(reader)

    def check(self) -> None:
        """Raise Preempted, after Ctrl-C Interrupted, if this or any other rank has been stopped. Cheap; never waits."""
        number = self.requested
        if not number and self._store is not None and self._store.check([self._key]):
            number = int(self._store.get(self._key))
        if number == signal.SIGINT:
            raise Interrupted("stopped by Ctrl-C")
        if number:
            raise Preempted("stopped by SIGTERM")
