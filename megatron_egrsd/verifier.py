"""math-verify in a process of its own, so that no answer can hang, crash or bloat the trainer.

math-verify stops itself with SIGALRM, which works in the main thread only and not while C code runs (10^10^10).
Here a timer of CPU seconds keeps its default action, which is to end the process: the kernel enforces it whatever
runs, and a busy machine does not turn right answers into wrong ones. The worker starts with the first answer that
needs it and ends when its input closes, so it never outlives the trainer.
"""

import json
import os
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from megatron_egrsd.errors import RunError

CPU_SECONDS = 5  # for one comparison
WALL_SECONDS = 60  # the same on a busy machine; met only by a worker that is stopped or swapped out
START_SECONDS = 120  # importing sympy, likewise
MEMORY = 4 << 30  # bytes of address space


@lru_cache(maxsize=16384)
def algebra_equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds the two equal; False where it takes too long or gives up. Any thread may call."""
    return _worker.ask(gold, answer)


class _Worker:
    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner = 0

    def ask(self, gold: str, answer: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
                self._start()
            try:
                self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                self.process.stdin.flush()
            except OSError:  # it died between the check and the question
                self._end()
                return False
            reply = self._reply(WALL_SECONDS)
            if reply is None:
                self._end()
            return reply == b"1"

    def _start(self) -> None:
        root = str(Path(__file__).parents[1])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
        command = [sys.executable, "-m", "megatron_egrsd.verifier"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self.owner = os.getpid()
        if self._reply(START_SECONDS) != b"ready":
            self._end()
            raise RunError("the verifying process does not start; check `python -c 'import math_verify'`")

    def _reply(self, seconds: float) -> bytes | None:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return (self.process.stdout.readline().strip() or None) if ready else None

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


_worker = _Worker()


def main() -> None:
    """The worker: a line of JSON [gold, answer] in, "1" or "0" out, "ready" before the first."""
    import logging
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes our input
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    @lru_cache(maxsize=1024)
    def parsed(text: str) -> list:
        return parse(f"${text}$", parsing_timeout=None)

    verify(parsed("x+1"), parsed("1+x"), timeout_seconds=None)  # the first comparison builds the parser's tables
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, unhandled, ends the process
        gold, answer = json.loads(line)
        try:
            equal = verify(parsed(gold), parsed(answer), timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(equal), flush=True)


if __name__ == "__main__":
    main()
