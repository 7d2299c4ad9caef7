"""Train every run of the plan that is not there yet, several at a time, each against an SGLang server that stays up."""

import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.runs import reason_in
from benchmarks.validate_method.hypotheses import CONFIG, STEPS, Setting, settings
from benchmarks.validate_method.record import begin_record, check_same, end_record
from megatron_egrsd.config import Config
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.report import read_evaluations
from megatron_egrsd.rollout.servers import RolloutServers

# A fork of one process that has imported everything: seven seconds of each run are saved.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["megatron_egrsd.train"])
_TIMEOUT = 1800  # seconds a run may take
DUMPED = {"tiny/egrsd", "doubting/wrong/egrsd"}  # seed 0 keeps its scores, for mechanism.py


def path_of(output: Path, setting: Setting, seed: int) -> Path:
    return output / "runs" / setting.name.replace(" ", "_") / f"seed-{seed}"


def is_complete(path: Path) -> bool:
    try:
        return read_evaluations(path)[-1]["step"] == STEPS
    except Exception:  #  whatever a stopped run left behind, it is made again
        return False


@dataclass(frozen=True)
class Run:
    """A setting with a seed; `words` are those of `megatron-egrsd train`, but for output and servers."""

    setting: Setting
    seed: int
    path: Path

    @property
    def name(self) -> str:
        return f"{self.setting.name}, seed {self.seed}"

    @property
    def words(self) -> list[str]:
        words = ["--config", CONFIG, *self.setting.options, "--seed", str(self.seed), "--steps", str(STEPS)]
        return words + ["--dump_scores", "true"] * (self.seed == 0 and self.setting.name in DUMPED)


def runs_of(output: Path, only: str = "", own: str = "") -> list[Run]:
    """Return the plan's runs of settings whose name starts with `only`, seed by seed."""
    found = [Run(s, n, path_of(output, s, n)) for s in settings(own) if s.name.startswith(only) for n in range(s.seeds)]
    if not found:
        raise BadArgument(f"no setting starts with {only!r}; they are {', '.join(s.name for s in settings(own))}")
    return sorted(found, key=lambda run: run.seed)


@dataclass
class _Study:
    """The runs that are left, and what became of the others; shared by the lanes."""

    output: Path
    config: Config
    runs: list[Run]
    todo: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    failed: dict[Run, str] = field(default_factory=dict)
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def tell(self, run: Run, state: str) -> None:
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (len(self.runs) - self.done) / 60
        print(f"{self.done:4d}/{len(self.runs)}  {run.name:42s}  {state}  about {left:.0f} minutes left", flush=True)


def run_all(output: Path, lanes: int, only: str, own: str) -> dict[Run, str]:
    """Make the missing runs on `lanes` lanes; a failure does not stop the others. Returns the failed ones' reasons.

    Raises BadArgument if `output` holds runs of other settings, RunError if no server can be started, or if SIGTERM or
    Ctrl-C stopped the study.
    """
    runs = runs_of(output, only, own)
    finished = [run for run in runs if is_complete(run.path)]
    for run in finished:
        check_same(run.path, run.words)
    # Its reader changes the working directory: not for a thread.
    study = _Study(output, parse_config(["--config", CONFIG]), [run for run in runs if run not in finished])
    print(f"{len(runs)} runs, {len(study.runs)} to make, {lanes} at a time", flush=True)
    for run in study.runs:
        study.todo.put(run)
    signal.signal(signal.SIGTERM, lambda *_: study.stop.set())
    with ThreadPoolExecutor(lanes) as threads:
        running = [threads.submit(_lane, study, lane) for lane in range(lanes)]
        try:
            while not all(lane.done() for lane in running):
                time.sleep(0.2)
        except KeyboardInterrupt:
            study.stop.set()
    for error in filter(None, (lane.exception() for lane in running)):
        raise RunError(str(error))
    if study.stop.is_set():
        raise RunError("stopped; the same command goes on from here")
    return study.failed


def _lane(study: _Study, lane: int) -> None:
    """Make runs from the queue until it is empty, all against one server: every run starts by sending it its weights.

    A run that fails gets a second attempt with a new server.
    """
    try:
        with contextlib.ExitStack() as server:
            urls: list[str] = []
            while not study.stop.is_set():
                try:
                    run = study.todo.get_nowait()
                except queue.Empty:
                    return
                for _ in range(2):
                    urls = urls or server.enter_context(_server(study, lane)).urls
                    began = time.monotonic()
                    error = _train(run, urls, study.stop)
                    if not error or study.stop.is_set():
                        break
                    print(f"{run.name}: {error}", flush=True)
                    server.close()
                    urls = []
                if study.stop.is_set():
                    return
                if error:
                    study.failed[run] = f"{error} (log {_log(run.path)})"
                    study.tell(run, "FAILED twice")
                else:
                    end_record(run.path)
                    final = read_evaluations(run.path)[-1]
                    result = f"accuracy {final['accuracy']:.3f}  length {final['length/mean']:5.1f}"
                    study.tell(run, f"{result}  {time.monotonic() - began:.0f} s")
    except Exception:  # a server that cannot be started ends the study
        study.stop.set()
        raise


def _server(study: _Study, lane: int) -> RolloutServers:
    config = study.config
    logs = study.output / "logs" / f"lane-{lane}"
    return RolloutServers(config.rollout.servers, config.model, lane, logs, key="")  # runs reach it by its address


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}.log")


def _train(run: Run, urls: list[str], stop: threading.Event) -> str:
    """Make one run in a process of its own; returns the reason if it failed."""
    shutil.rmtree(run.path, ignore_errors=True)
    begin_record(run.path, run.words)
    words = [*run.words, "--output", str(run.path), "--rollout.servers.urls", str(urls)]
    process = _processes.Process(target=_command, args=(words, _log(run.path)))
    process.start()
    deadline = time.monotonic() + _TIMEOUT
    while process.is_alive() and time.monotonic() < deadline and not stop.is_set():
        process.join(0.1)
    if process.is_alive():
        process.kill()
        process.join()
        return f"not done after {_TIMEOUT} s"
    return "" if process.exitcode == 0 and is_complete(run.path) else (reason_in(_log(run.path)) or "no output")


def _command(words: list[str], log: Path) -> None:
    """Run `megatron-egrsd train WORDS` in a process of its own, its output in `log`."""
    from megatron_egrsd import cli

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.main(["train", *words]))
