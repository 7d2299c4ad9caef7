"""The child process behind the verifier and the reader of answers."""

import os
import signal
import time
from subprocess import DEVNULL

import pytest

from megatron_egrsd.errors import RunError
from megatron_egrsd.system.worker_process import WorkerProcess


def sleeper():
    """Return the child's function: sleeps for the seconds asked for, then answers with its process id."""

    def answer(request: bytes) -> bytes:
        time.sleep(float(request))
        return str(os.getpid()).encode()

    return answer


@pytest.fixture
def worker():
    worker = WorkerProcess(f"{__file__}:sleeper", "pytest")
    yield worker
    worker.close()


def test_a_late_answer_ends_the_child_and_the_next_request_starts_another(worker):
    first = worker.ask(b"0")
    assert worker.ask(b"0") == first
    assert worker.ask(b"60", 0.2) is None and not os.path.exists(f"/proc/{int(first)}")
    assert worker.ask(b"no number") is None  # it raised
    assert worker.ask(b"0") != first


def test_signals_to_the_process_group_are_for_the_parent(worker):
    first = worker.ask(b"0")
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(int(first), number)
    assert worker.ask(b"0.1") == first


def test_a_fork_has_a_child_of_its_own(worker):
    first = worker.ask(b"0")
    if (fork := os.fork()) == 0:
        second = worker.ask(b"0")
        worker.close()
        os._exit(0 if second not in (first, None) else 1)
    assert os.waitpid(fork, 0)[1] == 0
    if (fork := os.fork()) == 0:
        worker.close()
        os._exit(0)
    os.waitpid(fork, 0)
    assert worker.ask(b"0") == first


def test_a_child_that_does_not_start_is_one_sentence():
    with pytest.raises(RunError, match="no_module:x does not start; check `python -c 'import numpy'`"):
        WorkerProcess("no_module:x", "numpy", stderr=DEVNULL).ask(b"")
