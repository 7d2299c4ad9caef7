"""`make soak MINUTES=60 SEED=n`: random faults at random moments of random short runs, each trial checked.

    python -m tests.faults.soak --minutes 60 --seed 1             # trials 0, 1, 2, ... of seed 1
    python -m tests.faults.soak --seed 1 --trial 17               # one of them again
    python -m tests.faults.soak --table one.jsonl another.jsonl   # the table of several --log files

A trial starts a run, strikes once, waits for the end of the run and, if it did not finish, continues it. It fails if

- a start does not end within DEADLINE, or ends with a status that its fault does not explain, or without a sentence;
- a process, shared memory or a temporary file is left;
- a checkpoint with a final name is not whole, or a file is half written;
- a step is missing or there twice, or its batch is not whole or not from the weights of its step;
- it trains on replayed rollouts, and metrics or weights differ in one bit from those of the undisturbed run.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import load_rollouts
from megatron_egrsd.rollout.servers import RolloutServers
from tests.copies import FIRST_VARIABLE, Source, adopting_orphans
from tests.faults import strikes
from tests.faults.runs import MODEL, PER_PROMPT, PROMPTS, ROOT, Run, numbers, replayed, steps, write_replay
from tests.faults.strikes import Failure
from tests.processes import abandoned, is_running, kill_tree, shared_memory
from tests.rollout.conftest import wait_until

STEPS = 4
TIMEOUT = 10  # parallel.timeout of replayed runs, seconds
DEADLINE = 120.0  # seconds for any start to end, whatever happens; machines are shared


@dataclass(frozen=True)
class Configuration:
    """One kind of short run. `source` of its rollouts: "replayed", "live" (its own server) or "attached" (a proxy)."""

    source: str = "replayed"
    ranks: int = 1
    settings: dict = field(default_factory=dict)
    lag: int = 0  # updates that a batch's weights may be behind
    hosts: int = 1


CONFIGURATIONS = {
    "one rank": Configuration(),
    "TP 2": Configuration(ranks=2, settings={"parallel.tensor": 2}),
    "PP 2": Configuration(ranks=2, settings={"parallel.pipeline": 2}),
    "DP 2": Configuration(ranks=2, settings={"parallel.distributed_optimizer": "true"}),
    "LoRA": Configuration(settings={"lora.rank": 4}),
    "asynchronous": Configuration(settings={"checkpoint.asynchronous": "true"}),
    "two hosts": Configuration(ranks=2, hosts=2),
    "live": Configuration("live"),
    "live TP 2": Configuration("live", ranks=2, settings={"parallel.tensor": 2}),
    "live LoRA": Configuration("live", settings={"lora.rank": 4, "rollout.sync.lora": "adapter",
                                                 "rollout.sync.transport": "ipc"}),
    "one step off": Configuration("live", settings={"rollout.staleness": 1, "objective.importance_cap": 2}, lag=1),
    "partial": Configuration("live", settings={"rollout.partial": "true", "rollout.staleness": 2,
                                               "rollout.extra_prompts": 3, "objective.importance_cap": 2}, lag=2),
    "colocated": Configuration("live", settings={"rollout.servers.colocated": "true",
                                                 "rollout.sync.transport": "ipc"}),
    "attached": Configuration("attached"),
}  # fmt: skip


@dataclass
class Trial:
    """One trial as its seed decides it, and what became of it."""

    seed: int
    number: int
    configuration: str
    fault: str
    moment: float  # share of the undisturbed run's time
    every: int  # checkpoint.every
    outcome: str = ""
    seconds: float = 0.0  # from the strike to the end of the start that was struck

    def chance(self, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.number}/{what}")


# Replayed runs take a fifth of a live run's time, and most of what can go wrong is in both.
_CYCLE = [
    (name, fault)
    for name, kind in CONFIGURATIONS.items()
    for fault in strikes.faults_of(kind)
    for _ in range(10 if kind.source == "replayed" else 1)
]


def draw(seed: int, number: int) -> Trial:
    """Return a trial. Each cycle of numbers has every fault of every configuration, in an order of its own."""
    cycle, place = divmod(number, len(_CYCLE))
    name, fault = random.Random(f"{seed}/cycle {cycle}").sample(_CYCLE, len(_CYCLE))[place]
    chance = random.Random(f"{seed}/{number}")
    return Trial(seed, number, name, fault, chance.random(), chance.choice([1, 1, 2, 3]))


class Soak:
    """Replayed rollouts, the undisturbed run of each configuration, a server for attached runs, and a directory.

    `first` ("module:function") is called in every process of the runs but the undisturbed ones: the tests of the soak
    break the code with it.
    """

    def __init__(self, directory: Path, stack: contextlib.ExitStack, first: str = ""):
        self.directory, self.stack, self.first = directory, stack, first
        self.replay = write_replay(directory / "replay", STEPS)
        self.problems = directory / "problems.jsonl"  # few of the demo's: each start reads them all
        lines = (ROOT / "examples/tiny/train.jsonl").read_text().splitlines(keepends=True)
        self.problems.write_text("".join(lines[:100]))
        self.undisturbed: dict[str, tuple[Path, float]] = {}
        self._attached = ""
        # What the first run would leave for later ones: matplotlib's cache.
        os.environ.setdefault("MPLCONFIGDIR", str(directory / "matplotlib"))
        stack.enter_context(adopting_orphans())
        source = stack.enter_context(Source())
        stack.enter_context(source.copied())
        self.kept = {child.pid for child in psutil.Process().children()}

    @property
    def server(self) -> str:
        """The address of a server that attached runs use one after another."""
        if not self._attached:
            words = ["--config", str(ROOT / "examples/configs/tiny_cpu.yaml"), "--model.path", str(MODEL)]
            config = parse_config(words)
            running = RolloutServers(config.rollout.servers, config.model, 0, self.directory / "attached", key="")
            self._attached = self.stack.enter_context(running).urls[0]
            self.kept.add(running.servers[0].process.pid)
        return self._attached

    def run(self, trial: Trial) -> None:
        """Make one trial. Raises Failure."""
        kind = CONFIGURATIONS[trial.configuration]
        expected, seconds = self._reference(trial.configuration)
        place = self.directory / str(trial.number)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with contextlib.ExitStack() as stack:
            memory = shared_memory()
            start = Starter(self, trial, kind, place, stack)
            struck = strikes.Strike(trial, kind, start, seconds, stack)
            struck.make()
            # A killed process removes nothing, but the run clears what its servers leave (rollout/scratch.py).
            known = {path.name for path in start.scratch.iterdir()} if struck.killed else set()
            if trial.outcome != "carried on":
                struck.mend()
                with start("again") as again:
                    status = start.ended(again, {0, 2} if kind.ranks == 1 else {0, 1})  # torchrun has 1 alone
                    # The strike came after the last checkpoint was written.
                    if status and "is the end of a run" not in again.text():
                        raise Failure(f"it does not continue:\n{again.text()}")
            _check_whole(start.output, kind, expected)
            left = {path.name for path in start.scratch.iterdir()}
            if left := {name for name in left if name not in known or name.startswith("megatron-egrsd-")}:
                raise Failure(f"temporary files are left: {sorted(left)[:3]}")
            if not wait_until(lambda: not abandoned(shared_memory() - memory), 10):
                logs = "\n".join(log.read_text(errors="replace")[-1500:] for log in sorted(place.glob("*.log")))
                raise Failure(f"shared memory is left: {sorted(shared_memory() - memory)[:3]}\n{logs}")
        shutil.rmtree(place)

    def _reference(self, name: str) -> tuple[Path, float]:
        """Return output and seconds of the undisturbed run."""
        if name not in self.undisturbed:
            place = self.directory / f"undisturbed {name}"
            place.mkdir()
            first, self.first = self.first, ""
            trial = Trial(0, 0, name, "none", 0.0, 1)
            with contextlib.ExitStack() as stack:
                start = Starter(self, trial, CONFIGURATIONS[name], place, stack)
                began = time.monotonic()
                with start("run") as run:
                    start.ended(run, {0})
                self.undisturbed[name] = start.output, time.monotonic() - began
            self.first = first
        return self.undisturbed[name]


class Starter:
    """Starts the run of a trial, again and again on one output."""

    def __init__(self, soak: Soak, trial: Trial, kind: Configuration, place: Path, stack: contextlib.ExitStack):
        self.soak, self.trial, self.kind, self.place = soak, trial, kind, place
        self.output, self.scratch = place / "run", place / "tmp"
        self.scratch.mkdir()
        self.environment: dict[str, str] = {}
        self.urls: list[str] = []
        self._runs: set[int] = set()
        if kind.hosts > 1:
            self.environment = stack.enter_context(strikes.second_host())
        if kind.source == "attached":
            self.urls = [soak.server]

    def __call__(self, name: str, first: str = "", **environment: str) -> Run:
        settings = {
            "steps": STEPS, "checkpoint.every": self.trial.every, "checkpoint.resume": "auto",
            "parallel.timeout": TIMEOUT, "data.train": self.soak.problems, **self.kind.settings,
        }  # fmt: skip
        if self.kind.source == "replayed":
            settings |= replayed(self.soak.replay)
        else:
            settings |= {"dump_rollouts": "true", "parallel.timeout": 60, "rollout.servers.request_timeout": 30,
                         "rollout.servers.start_timeout": 90, "rollout.servers.health_timeout": 25,
                         "rollout.servers.request_retries": 12}  # fmt: skip
        if self.urls:
            settings["rollout.servers.urls"] = json.dumps(self.urls)
        firsts = [f for f in (self.soak.first, self.kind.hosts > 1 and strikes.ON_THE_SECOND_HOST, first) if f]
        environment = {"TMPDIR": str(self.scratch), FIRST_VARIABLE: " ".join(firsts)} | self.environment | environment
        # The output may lie on a disk that is full; the log does not.
        log = self.place / f"{name}.log"
        run = Run(self.output, ranks=self.kind.ranks, log=log, environment=environment, **settings)
        self._runs.add(run.process.pid)
        return run

    def ended(self, run: Run, allowed: set[int]) -> int:
        """Return the status of a start that must end by itself, with nothing left. Raises Failure."""
        try:
            status = run.finish(DEADLINE)
        except AssertionError:
            raise Failure(f"not ended after {DEADLINE:.0f} s:\n{run.text()}") from None
        if status not in allowed:
            raise Failure(f"status {status}, allowed are {sorted(allowed)}:\n{run.text()}")
        # torchrun alone can say that a rank ended by a signal (SIGABRT: of gloo's own thread), or it itself.
        said = re.search(r"megatron-egrsd: |\(SIG(KILL|TERM|ABRT)\)|got signal: 2", run.text())
        if status in (1, 2) and not said:
            raise Failure(f"status {status} without a sentence:\n{run.text()}")
        if left := self._left():
            raise Failure(f"processes are left: {left}\n{run.text()}")
        return status

    def _left(self, patience: float = 15.0) -> list[str]:
        """Return the processes that runs have left, and end them: this process adopts all that lose their parent."""
        ours, end = self.soak.kept | self._runs, time.monotonic() + patience
        while left := [p for p in psutil.Process().children() if p.pid not in ours and is_running(p)]:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        found = [f"{process.pid} {' '.join(process.cmdline())[:100]}" for process in left]
        for process in left:
            kill_tree(process.pid)
        for process in psutil.Process().children():  # adopted, and ended: thousands would slow every look at processes
            if process.pid not in ours and not is_running(process):
                os.waitpid(process.pid, os.WNOHANG)
        return found


def _check_whole(output: Path, kind: Configuration, expected: Path) -> None:
    if steps(output) != list(range(1, STEPS + 1)):
        raise Failure(f"the steps are {steps(output)}")
    if kind.source == "replayed":
        if numbers(output) != numbers(expected):
            raise Failure("the metrics differ from the undisturbed run's")
        for found in sorted(expected.glob("*/*.safetensors")):
            got, want = load_file(output / found.relative_to(expected)), load_file(found)
            if got.keys() != want.keys() or not all(got[key].equal(want[key]) for key in want):
                raise Failure(f"{found.relative_to(expected)} differs from the undisturbed run's")
    else:
        for step in range(1, STEPS + 1):
            rollouts = load_rollouts(output / "rollouts" / f"step_{step:06d}.jsonl")
            groups = collections.Counter(r.group for r in rollouts)
            if len(rollouts) != PROMPTS * PER_PROMPT or set(groups.values()) != {PER_PROMPT}:
                raise Failure(f"the batch of step {step} is not whole: {groups}")
            behind = {step - 1 - version for r in rollouts for version, _ in r.versions}
            if not behind <= set(range(kind.lag + 1)):
                raise Failure(f"the batch of step {step} is from weights that are {sorted(behind)} updates behind")
        if not list(output.glob("hf/*.safetensors")):
            raise Failure("there is no model at the end")
    if partial := list(output.rglob("*.partial")):
        raise Failure(f"incomplete files are left: {partial[:3]}")


def table(trials: list[Trial]) -> str:
    """Return the trials by fault: how many on each source of rollouts, what became of them, and the longest end."""
    sources = sorted({kind.source for kind in CONFIGURATIONS.values()}, reverse=True)
    outcomes = ("carried on", "ended, resumed", "failed")
    head = ["fault", *sources, *outcomes, "slowest end"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for fault in strikes.FAULTS:
        made = [trial for trial in trials if trial.fault == fault]
        if made:
            by = collections.Counter(CONFIGURATIONS[trial.configuration].source for trial in made)
            became = collections.Counter(trial.outcome for trial in made)
            cells = [fault, *(by[name] for name in sources), *(became[name] for name in outcomes)]
            lines.append(f"| {' | '.join(map(str, cells))} | {max(trial.seconds for trial in made):.0f} s |")
    by = collections.Counter(trial.configuration for trial in trials)
    lines += ["", "| configuration | trials |", "|---|---|", *(f"| {name} | {by[name]} |" for name in CONFIGURATIONS)]
    return "\n".join(lines)


def _trials(options: argparse.Namespace) -> Iterator[Trial]:
    if options.trial is not None:
        yield draw(options.seed, options.trial)
        return
    end, number = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < end:
        trial = draw(options.seed, number)
        number += 1
        if strikes.possible(trial.fault, CONFIGURATIONS[trial.configuration]):
            yield trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="make this one alone")
    parser.add_argument("--log", type=Path, help="append one JSON object a trial to this file")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these logs, and make no trial")
    options = parser.parse_args()
    if options.table:
        print(table([Trial(**json.loads(line)) for path in options.table for line in path.read_text().splitlines()]))
        return 0
    made = []
    with tempfile.TemporaryDirectory(prefix="soak-") as directory, contextlib.ExitStack() as stack:
        soak = Soak(Path(directory), stack)
        for trial in _trials(options):
            try:
                soak.run(trial)
            except Failure as failure:
                trial.outcome = "failed"
                again = f"python -m tests.faults.soak --seed {trial.seed} --trial {trial.number}"
                print(f"FAILED {trial}\n{failure}\nagain: {again}", flush=True)
            made.append(trial)
            if options.log:
                with options.log.open("a") as file:
                    file.write(json.dumps(asdict(trial)) + "\n")
    failed = sum(trial.outcome == "failed" for trial in made)
    print(f"{table(made)}\n\n{len(made)} trials, {failed} failed; seed {options.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
