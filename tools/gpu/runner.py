"""Run stages one after the other, each a process with a time limit, within a number of seconds for all of them.

A stage's file, DIRECTORY/NAME.json, is written before it starts (state "running"), by the stage itself as it measures
(results.py), and when it has ended; always under another name first, so that it is complete at any moment. Its
output is added to DIRECTORY/NAME.log. A stage that fails or hangs does not stop the next one. All processes that it has
started, those that left its session too, are killed when it ends.
"""

import ctypes
import datetime
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.gpu.results import ABSENT_STATUS, RESULT_VARIABLE, read, write

LEAST = 5.0  # seconds: a stage with less time left is not begun
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_PR_SET_CHILD_SUBREAPER = 36
# No stage waits for a network or for input.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PIP_NO_INDEX": "1"}


@dataclass(frozen=True)
class Stage:
    """One process: its name, the longest time it may take in seconds, its command, and what it is for."""

    name: str
    seconds: float
    command: Sequence[str]
    about: str = ""


def run(stages: Sequence[Stage], directory: Path, seconds: float, facts: dict, again: bool = False) -> bool:
    """Run `stages` in order; those that a call before this one has done are skipped, unless `again`.

    Each stage gets its own limit or what is left of `seconds`, whichever is less. `facts` describe the machine and go
    into every file. Returns whether all stages are done, or absent. SIGTERM ends the stage that runs, and then raises
    SystemExit.
    """
    signal.signal(signal.SIGTERM, lambda *_: exit(128 + signal.SIGTERM))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a dead stage leaves becomes a child of this process
    deadline = time.monotonic() + seconds
    directory.mkdir(parents=True, exist_ok=True)
    complete = True
    for stage in stages:
        if not again and read(directory, stage.name).get("state") == "done":
            print(f"{stage.name}: done before, skipped", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            print(f"{stage.name}: not begun, no time is left", flush=True)
            complete = False
            continue
        result = _run(stage, directory, left, facts)
        complete &= result["state"] in ("done", "absent")
        print(
            f"{stage.name}: {result['state']} after {result['seconds']:.0f} s, {deadline - time.monotonic():.0f} s left"
            + f"; {result['reason']}" * bool(result["reason"]),
            flush=True,
        )
    return complete


def _run(stage: Stage, directory: Path, left: float, facts: dict) -> dict:
    """Run one stage for at most `left` seconds, and return the content of its file."""
    limit, start = min(stage.seconds, left), time.monotonic()
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    first = {"stage": stage.name, "about": stage.about, "state": "running", "begun": begun, "limit": round(limit),
             **facts, "rows": []}  # fmt: skip
    write(directory, stage.name, first)
    environment = os.environ | _OFFLINE | {RESULT_VARIABLE: str((directory / f"{stage.name}.json").absolute())}
    state, reason = "cut", "the whole run was stopped"
    try:
        with open(directory / f"{stage.name}.log", "ab") as log:
            log.write(f"== {begun}: {' '.join(stage.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(stage.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                       env=environment, start_new_session=True)  # fmt: skip
        try:
            state, reason = _verdict(process.wait(limit))
        except subprocess.TimeoutExpired:
            own = stage.seconds <= left
            state, reason = ("timed out", f"its limit is {limit:.0f} s") if own else ("cut", "no time was left")
    except OSError as error:
        state, reason = "failed", str(error)
    finally:
        _kill_descendants()
        # A row that the stage has written stays, however it ended.
        last = read(directory, stage.name) or first
        if state == "absent":
            reason = last.get("reason", "")
        elif state == "failed" and not reason.startswith("["):
            reason += f"; the last lines are in {stage.name}.log"
        result = last | {"state": state, "reason": reason, "seconds": round(time.monotonic() - start, 1)}
        write(directory, stage.name, result)
    return result


def _verdict(status: int) -> tuple[str, str]:
    if status == 0:
        return "done", ""
    if status == ABSENT_STATUS:
        return "absent", ""
    return "failed", f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _kill_descendants() -> None:
    """End every process below this one: SIGTERM, then SIGKILL, until none is left."""
    waiting = psutil.Process().children(recursive=True)
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        for process in waiting:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(waiting, timeout=seconds)
        waiting = psutil.Process().children(recursive=True)  # some may have been started meanwhile
        if not waiting:
            return
