"""math-verify in a process of its own, so that no answer can hang, crash or bloat the trainer.

math-verify limits its time with SIGALRM, which works only in the main thread and not while C code runs (10^10^10). This
worker sets a timer of CPU seconds with the default action, which ends the process: the kernel enforces it in any code,
and on a busy machine right answers stay right.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from subprocess import DEVNULL

from megatron_egrsd.system.worker_process import WorkerProcess

CPU_SECONDS = 5  # for one comparison
WALL_SECONDS = 60  # for one comparison on a busy machine; only a worker that is stopped or swapped out exceeds it
MEMORY = 4 << 30  # bytes of address space


class GaveUp(Exception):
    """A comparison exceeded its time or memory."""


def algebra_equal(gold: str, answer: str) -> bool:
    """Return whether math-verify finds the two equal. Any thread may call. Raises GaveUp if it takes too long."""
    reply = _worker.ask(json.dumps([gold, answer]).encode(), WALL_SECONDS)
    if reply is None:
        raise GaveUp
    return reply == b"1"


_worker = WorkerProcess(f"{__name__}:comparison", "math_verify", stdout=DEVNULL, stderr=DEVNULL)


def comparison() -> Callable[[bytes], bytes]:
    """Return the worker's function: JSON [gold, answer] in, b"1" or b"0" out."""
    import logging
    import resource
    import signal

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

    def answer(request: bytes) -> bytes:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, unhandled, ends the process
        try:
            same = equal(*json.loads(request))
        except (Exception, RecursionError, MemoryError):
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        return b"1" if same else b"0"

    equal("x+1", "1+x")  # the first comparison builds the parser's tables
    return answer


def _far_apart(golds: list, answers: list) -> bool:
    """Return whether two numbers differ by a relative 1e-5. math-verify rounds to six places: to it 3e-9 is 4e-9."""
    numbers = [e for e in (*golds, *answers) if getattr(e, "is_number", False) and e.is_finite]
    if len(golds) != 1 or len(answers) != 1 or len(numbers) != 2:
        return False
    a, b = (e.evalf(20) for e in numbers)
    return bool(abs(a - b) > 1e-5 * max(abs(a), abs(b)))
