"""Ctrl-C at a place of one's own choosing: the interpreter raises it between any two instructions of the main thread.

A lock that is just being taken then stays taken. concurrent.futures takes several, so that an interrupted pool of
threads may wait for itself for ever.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held_back(stop: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Raise what a Ctrl-C raises at the end of the block, which `stop` may bring about; a second one ends it at once.

    Elsewhere than on the main thread, and where another handler than Python's keeps the signal, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    raised: list[BaseException] = []

    def hold_back(number, frame):
        try:
            before(number, frame)
        except BaseException as interrupt:
            if raised:
                raise
            raised.append(interrupt)
            stop()

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if raised:
            raise raised[0]
