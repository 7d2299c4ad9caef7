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
    """A comparison that exceeded its time or memory."""


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
        same = verify(*expressions, timeout_seconds=None, allow_set_relation_comp=True)
        return same or _equal_for_positive(*expressions)

    def answer(request: bytes) -> bytes:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, unhandled, ends the process
        try:
            same = equal(*json.loads(request))
        except Exception:
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


def _equal_for_positive(golds: list, answers: list) -> bool:
    """Return whether two expressions with roots are equal for positive variables: sqrt(1/n) and 1/sqrt(n).

    Not for absolute values, nor for roots of even powers, which differ for negative variables as everybody knows.
    """
    import sympy

    found = [e for e in (*golds[:1], *answers[:1]) if isinstance(e, sympy.Expr)]
    if len(found) != 2 or not all(e.free_symbols for e in found):
        return False
    powers = [p for e in found for p in e.atoms(sympy.Pow)]
    roots = [p for p in powers if p.exp.is_Rational and not p.exp.is_Integer]
    hidden = [p for root in roots for p in root.base.atoms(sympy.Pow) if p.exp.is_even]
    if not roots or hidden or any(e.has(sympy.Abs) for e in found):
        return False
    positive = {s: sympy.Symbol(s.name, positive=True) for e in found for s in e.free_symbols}
    return sympy.simplify(found[0].subs(positive) - found[1].subs(positive)) == 0
