"""math-verify in a process of its own, so that no answer can hang, crash or bloat the trainer.

math-verify limits its time with SIGALRM, which works only in the main thread and not while C code runs (10^10^10). This
worker sets a timer of CPU seconds with the default action, which ends the process: the kernel enforces it in any code,
and on a busy machine right answers stay right. The worker starts with the first answer that needs it and ends when its
input closes, so it never outlives the trainer.
"""

import atexit
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
WALL_SECONDS = 60  # for one comparison on a busy machine; only a worker that is stopped or swapped out exceeds it
START_SECONDS = 120  # for importing sympy on a busy machine
MEMORY = 4 << 30  # bytes of address space


class GaveUp(Exception):
    """A comparison exceeded its time or memory."""


def algebra_equal(gold: str, answer: str) -> bool:
    """Return whether math-verify finds the two equal. Any thread may call. Raises GaveUp if it takes too long."""
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
                reply = self._reply(WALL_SECONDS)
            except OSError:  # it died between the check and the question
                reply = None
            if reply is None:
                self._end()
                raise GaveUp
            return reply == b"1"

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
        command = [sys.executable, "-m", "megatron_egrsd.rewards.verifier"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self.owner = os.getpid()
        if self._reply(START_SECONDS) != b"ready":
            self._end()
            raise RunError("the verifying process does not start; check `python -c 'import math_verify'`")

    def _reply(self, seconds: float) -> bytes | None:
        output = select.poll()  # select() is limited to 1,024 files, which a busy client exceeds
        output.register(self.process.stdout, select.POLLIN)
        return (self.process.stdout.readline().strip() or None) if output.poll(seconds * 1000) else None

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def close(self) -> None:
        """At the end of this process: not by a child that inherited it."""
        if self.process is not None and self.owner == os.getpid():
            self._end()


_worker = _Worker()
atexit.register(_worker.close)


def main() -> None:
    """Run the worker: print "ready", then read lines of JSON [gold, answer] and print "1" (equal) or "0" for each."""
    import logging
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes our input
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    @lru_cache(maxsize=1024)
    def parsed(text: str) -> list:
        # No fallback: math-verify's fallbacks parse a part of an unreadable text ("3:1" becomes 3).
        return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)

    def equal(gold: str, answer: str) -> bool:
        expressions = parsed(gold), parsed(answer)
        if _far_apart(*expressions):
            return False
        return verify(*expressions, timeout_seconds=None, allow_set_relation_comp=True)

    equal("x+1", "1+x")  # the first comparison builds the parser's tables
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, unhandled, ends the process
        gold, answer = json.loads(line)
        try:
            same = equal(gold, answer)
        except (Exception, RecursionError, MemoryError):
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(same), flush=True)


def _far_apart(golds: list, answers: list) -> bool:
    """Return whether two numbers differ by a relative 1e-5. math-verify rounds to six places: to it 3e-9 is 4e-9."""
    numbers = [e for e in (*golds, *answers) if getattr(e, "is_number", False) and e.is_finite]
    if len(golds) != 1 or len(answers) != 1 or len(numbers) != 2:
        return False
    a, b = (e.evalf(20) for e in numbers)
    return bool(abs(a - b) > 1e-5 * max(abs(a), abs(b)))


if __name__ == "__main__":
    main()
