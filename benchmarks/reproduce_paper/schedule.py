"""Run the cells that are not finished, one after the other; several nodes may do so at the same time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.reproduce_paper.cells import Cell
from benchmarks.reproduce_paper.claim import Claim, claimed, holder
from benchmarks.reproduce_paper.site import Command, Site
from benchmarks.runs import ROOT, reason_in
from megatron_egrsd.errors import RunError
from megatron_egrsd.system.files import write_text

_SAVING = 900.0  # seconds that a process may take to save and end after a signal
_POLL = 0.2


class Stopped(Exception):
    """A request to stop this process, or the loss of its cell to another one."""


class Elsewhere(Exception):
    """A cell that another process works on; the message says which process."""


@dataclass
class Outcome:
    """The cells of a schedule by what became of them; `failed` has the reasons."""

    finished: list[Cell] = field(default_factory=list)
    elsewhere: list[Cell] = field(default_factory=list)
    failed: dict[Cell, str] = field(default_factory=dict)
    stopped: bool = False


def run_all(cells: list[Cell], site: Site) -> Outcome:
    """Run each cell to its end unless it is finished or another process holds it. A failure does not stop the others.

    SIGTERM and SIGINT let the running process save, and end the schedule; the same cells can be run again then.
    """
    outcome = Outcome()
    with _stop_signals() as stop:
        for number, cell in enumerate(cells, 1):
            if stop():
                outcome.stopped = True
                break
            started = time.monotonic()
            try:
                new = _run_once(cell, site, stop)
            except Stopped:
                outcome.stopped = True
                break
            except Elsewhere as other:
                outcome.elsewhere.append(cell)
                state = f"runs on {other}"
            except RunError as error:
                outcome.failed[cell] = str(error)
                state = f"FAILED: {error}"
            else:
                outcome.finished.append(cell)
                state = f"finished, {time.monotonic() - started:.0f} s" if new else "is finished"
            print(f"{number:3d}/{len(cells)}  {cell.key:32s} {state}", flush=True)
    return outcome


def _run_once(cell: Cell, site: Site, stop: Callable[[], bool]) -> bool:
    """Run a cell to its end; returns False if it was finished before.

    Raises RunError with the reason and the log if it fails, Elsewhere if another process holds it, or Stopped.
    """
    directory = site.directory(cell)
    _check_identity(directory / "cell.json", site.identity(cell))
    if site.is_finished(cell):
        return False
    with claimed(directory) as claim:
        if claim is None:
            raise Elsewhere(holder(directory) or "another node")
        if site.is_finished(cell):  # by the process that held it a moment ago
            return False
        failure = directory / "failure.json"
        try:
            _run(cell, site, claim, stop)
        except RunError as error:
            write_text(failure, json.dumps({"reason": str(error)}))
            raise
        failure.unlink(missing_ok=True)
    return True


def _run(cell: Cell, site: Site, claim: Claim, stop: Callable[[], bool]) -> None:
    directory, evaluation = site.directory(cell), site.evaluation_of(cell)

    def call(command: Command, name: str, ending: int) -> None:
        log = directory / name
        start = log.stat().st_size if log.exists() else 0  # earlier attempts
        if status := _call(command, log, ending, lambda: stop() or claim.lost.is_set()):
            raise RunError(f"{reason_in(log, start) or f'status {status}'} (log {log})")

    if not site.is_trained(cell):
        call(site.training(cell), "train.log", signal.SIGTERM)  # saves a checkpoint
        if not site.is_trained(cell):
            raise RunError(f"the training was stopped before its last step (log {directory / 'train.log'})")
    for left in evaluation.glob(".hf-*"):  # a merged model of an evaluation that was killed
        shutil.rmtree(left, ignore_errors=True)
    call(site.evaluation(cell), "evaluate.log", signal.SIGINT)  # keeps its samples
    if not site.is_finished(cell):
        raise RunError(f"the evaluation wrote no results.json (log {directory / 'evaluate.log'})")


def _check_identity(path: Path, now: dict[str, object]) -> None:
    """Raise RunError if the cell was begun with other words. A new cell writes down those of now."""
    if not path.is_file():
        write_text(path, json.dumps(now, indent=1))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key, value in now.items():
        if before.get(key) != value:
            raise RunError(
                f"it was begun with {key} {before.get(key)}, not {value}; choose another output, or remove "
                f"{path.parent}"
            )


def _call(command: Command, log: Path, ending: int, stop: Callable[[], bool]) -> int:
    """Run a process to its end, its output behind what `log` holds, and return its status.

    Raises Stopped if `stop()` was true meanwhile: the process then got the signal `ending`, and time to save.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **command.variables}
    with log.open("ab") as file:
        process = subprocess.Popen(command.words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        while process.poll() is None:
            if stop():
                process.send_signal(ending)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SAVING)
                raise Stopped
            time.sleep(_POLL)
        return process.returncode
    finally:
        if process.poll() is None:
            # By the tree: what a launcher starts in the background has a process group of its own.
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM or SIGINT has come; their handlers are restored at the end."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
