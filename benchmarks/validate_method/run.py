"""Train every run of the plan that is not there yet, several at a time, each against an SGLang server that stays up."""

import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.runs import reason_in
from benchmarks.validate_method.plan import CONFIG, STEPS, Setting, settings
from megatron_egrsd.config import Config
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.report import read_evaluations
from megatron_egrsd.rollout.servers import RolloutServers

# A fork of one process that has imported everything: seven seconds of each run are saved.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["megatron_egrsd.train"])
_TIMEOUT = 1800  # seconds a run may take
DUMPED = {"tiny/egrsd", "doubting/egrsd", "doubting/egrsd/wrong"}  # seed 0 keeps its scores, for mechanism.py


def path_of(output: Path, setting: Setting, seed: int) -> Path:
    return output / "runs" / setting.name.replace(" ", "_") / f"seed-{seed}"


def is_complete(path: Path) -> bool:
    try:
        return read_evaluations(path)[-1]["step"] == STEPS
    except Exception:  #  whatever a stopped run left behind, it is made again
        return False


def run_all(output: Path, lanes: int, only: str, own: str) -> None:
    """All missing runs of settings whose name starts with `only`, on `lanes` lanes. RunError where one fails twice."""
    plan = [s for s in settings(own) if s.name.startswith(only)]
    if not plan:
        raise BadArgument(f"no setting starts with {only!r}; they are {', '.join(s.name for s in settings(own))}")
    todo: queue.SimpleQueue = queue.SimpleQueue()
    runs = [(s, seed) for s in plan for seed in range(s.seeds)]
    runs.sort(key=lambda run: ("," in run[0].name, run[1]))  # ablations last; else seed by seed
    missing = [(s, seed) for s, seed in runs if not is_complete(path_of(output, s, seed))]
    print(f"{len(runs)} runs, {len(missing)} to make, {lanes} at a time", flush=True)
    for run in missing:
        todo.put(run)
    config = parse_config(["--config", CONFIG])  # reads with another working directory: not for a thread
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with ThreadPoolExecutor(lanes) as threads:
        running = [threads.submit(_lane, config, output, lane, todo, len(missing), stop) for lane in range(lanes)]
        try:
            while not all(lane.done() for lane in running):
                time.sleep(0.2)
        except KeyboardInterrupt:
            stop.set()
    for error in filter(None, (lane.exception() for lane in running)):
        raise RunError(str(error))
    if stop.is_set():
        raise RunError("stopped; the same command goes on from here")


def _lane(config: Config, output: Path, lane: int, todo, total: int, stop: threading.Event) -> None:
    """Runs from the queue until it is empty, all against one server: every run starts by sending it its weights."""
    try:
        with RolloutServers(config.rollout.servers, config.model, lane, output / "logs" / f"lane-{lane}") as servers:
            while not stop.is_set():
                try:
                    setting, seed = todo.get_nowait()
                except queue.Empty:
                    return
                started = time.monotonic()
                path = path_of(output, setting, seed)
                for attempt in (1, 2):
                    error = _train(setting, seed, path, servers.urls, stop)
                    if not error or stop.is_set():
                        break
                    print(f"{setting.name}, seed {seed}, attempt {attempt}: {error}", flush=True)
                else:
                    raise RunError(f"{setting.name}, seed {seed} failed twice: {error}")
                if not stop.is_set():
                    final = read_evaluations(path)[-1]
                    result = f"accuracy {final['accuracy']:.3f}  length {final['length/mean']:5.1f}"
                    seconds = time.monotonic() - started
                    done = total - todo.qsize()
                    print(
                        f"{done:4d}/{total}  {setting.name:42s} seed {seed:2d}  {result}  {seconds:.0f} s", flush=True
                    )
    except Exception:  # one lane's failure ends the study
        stop.set()
        raise


def _train(setting: Setting, seed: int, path: Path, urls: list[str], stop: threading.Event) -> str:
    """One run in a process of its own; the reason if it failed."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = ["--config", CONFIG, *setting.options, "--seed", str(seed), "--steps", str(STEPS)]
    words += ["--output", str(path), "--rollout.servers.urls", str(urls)]
    if seed == 0 and setting.name in DUMPED:
        words += ["--dump_scores", "true"]
    log = path.parent / f"seed-{seed}.log"
    process = _processes.Process(target=_command, args=(words, log))
    process.start()
    deadline = time.monotonic() + _TIMEOUT
    while process.is_alive() and time.monotonic() < deadline and not stop.is_set():
        process.join(0.1)
    if process.is_alive():
        process.kill()
        process.join()
        return f"not done after {_TIMEOUT} s"
    return "" if process.exitcode == 0 and is_complete(path) else (reason_in(log) or "no output")


def _command(words: list[str], log: Path) -> None:
    """`megatron-egrsd train WORDS` in a process of its own, its output in `log`."""
    from megatron_egrsd import cli

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.main(["train", *words]))
