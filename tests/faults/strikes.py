"""The faults of the soak (soak.py): what strikes a run, and what it may do then."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from megatron_egrsd.engine import checkpoint
from megatron_egrsd.errors import BadArgument
from tests.faults import plants
from tests.faults.proxy import FAULTS as ANSWERS
from tests.faults.proxy import FaultyProxy
from tests.faults.runs import Run
from tests.processes import kill, kill_tree

if TYPE_CHECKING:
    from tests.faults.soak import Configuration, Starter, Trial

_OF_RUNS = ("kill", "kill all", "freeze", "SIGTERM", "SIGINT", "full disk", "flipped byte", "file handles",
            "clock jump", "second run")  # fmt: skip
_OF_SERVERS = ("kill server", "freeze server")
_OF_ANSWERS = ("bad answers", "slow answers")
_OF_NETWORKS = ("cut network",)
FAULTS = (*_OF_RUNS, *_OF_SERVERS, *_OF_ANSWERS, *_OF_NETWORKS)
ON_THE_SECOND_HOST = f"{plants.__name__}:on_the_second_host"
_REFUSED = "another run is writing"  # whichever of two runs comes second
_ADDRESSES = ("10.79.0.1", "10.79.0.2")

# What a start that suffers a fault may end with. Ranks that lose another one end with 1, and so does their torchrun; a
# run whose server dies before it has ever been healthy ends with 1 as well. SIGTERM ends a rank that still starts.
_STATUSES = {
    "kill": {0, 1, -signal.SIGKILL}, "kill all": {0, -signal.SIGKILL}, "freeze": {0, 1},
    "SIGTERM": {0, 1, -signal.SIGTERM}, "SIGINT": {0, 1, 130, -signal.SIGINT}, "full disk": {0, 1},
    "flipped byte": {0, -signal.SIGKILL},
    "file handles": {0, 1, 2}, "clock jump": {0}, "second run": {0, 1, 2}, "kill server": {0, 1},
    "freeze server": {0, 1},
    "bad answers": {0}, "slow answers": {0}, "cut network": {0, 1},
}  # fmt: skip


def faults_of(kind: "Configuration") -> list[str]:
    """Return the faults that can strike runs of `kind`. Those that it alone can suffer are drawn more often."""
    if kind.source == "attached":
        return [*_OF_RUNS, *_OF_ANSWERS * 5]
    if kind.hosts > 1:
        return [*_OF_NETWORKS]
    return [*_OF_RUNS, *(_OF_SERVERS * 3 if kind.source == "live" else ())]


def possible(fault: str, kind: "Configuration") -> bool:
    """Return whether this machine can make the trial: mounting and network namespaces take root."""
    if fault == "full disk":
        return os.geteuid() == 0 and shutil.which("mount") is not None
    return kind.hosts == 1 or (os.geteuid() == 0 and shutil.which("ip") is not None)


class Failure(Exception):
    """What a trial found."""


class Strike:
    """One fault that strikes one start of a run. `seconds` is the time of an undisturbed start."""

    def __init__(self, trial: "Trial", kind: "Configuration", start: "Starter", seconds: float,
                 stack: contextlib.ExitStack):  # fmt: skip
        self.trial, self.kind, self.start, self.stack = trial, kind, start, stack
        self.fault, self.moment, self.chance = trial.fault, trial.moment * seconds, trial.chance("strike")
        self.disk: Path | None = None
        self.killed = False  # whether a process of the run was killed, by this or by torchrun

    def make(self) -> None:
        """Start the run, strike, wait for its end, and note the outcome. Raises Failure."""
        with self._prepared() as run:
            self._wait(run)
            began = time.monotonic()
            self._strike(run)
            status = self.start.ended(run, _STATUSES[self.fault])
            self.trial.seconds = time.monotonic() - began
            if status and self.fault == "second run" and _REFUSED not in run.text():
                raise Failure(f"status {status} of a run that no other one kept from its output:\n{run.text()}")
        self._check_checkpoints()
        self.killed = status < 0 or "SIGKILL) received" in run.text() or self.fault in _OF_SERVERS
        carried_on = status == 0 and "resumable" not in run.text()
        if self.fault == "flipped byte":
            carried_on = not self._flip() and carried_on
        self.trial.outcome = "carried on" if carried_on else "ended, resumed"

    def mend(self) -> None:
        """Remove the cause, so that the run can be continued."""
        if self.disk:
            _mount("remount,size=64m", self.disk)
        if self.fault == "cut network":
            _ip("link", "set", self.start.environment[f"{plants.NAMESPACE}_CABLE_0"], "up")

    def _prepared(self) -> Run:
        seed = {plants.SEED: f"{self.trial.seed}/{self.trial.number}"}
        if self.fault == "file handles":
            limit = {plants.HANDLES: str(self.chance.randrange(14, 90))}
            return self.start("struck", f"{plants.__name__}:few_handles", **limit)
        if self.fault == "clock jump":
            return self.start("struck", f"{plants.__name__}:clock_jumps", **seed)
        if self.fault == "full disk":
            self.disk = self.start.place / "disk"
            self.disk.mkdir()
            _mount(f"size={self.chance.randrange(1500, 9000)}k", self.disk)
            self.stack.callback(subprocess.run, ["umount", "-l", self.disk], check=True, timeout=20)
            self.start.output = self.disk / "run"
        if self.fault in _OF_ANSWERS:
            faults = ["delay"] if self.fault == "slow answers" else [f for f in ANSWERS if f not in ("nan", "delay")]
            proxy = FaultyProxy(self.start.urls[0], self.chance, 0.2, faults, patience=2.0)
            self.start.urls = [self.stack.enter_context(proxy).url]
        return self.start("struck")

    def _wait(self, run: Run) -> None:
        """Wait until the moment of the strike, or the end of the run."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(self.moment)

    def _strike(self, run: Run) -> None:
        fault, running = self.fault, run.process.poll() is None
        if not running:
            return
        if fault in ("kill", "freeze", "SIGTERM"):
            if (victim := self._victim(run)) is None:
                return
            if fault == "freeze":
                self._freeze(run, victim)
            else:
                kill(victim, signal.SIGKILL if fault == "kill" else signal.SIGTERM)
        elif fault in ("kill all", "flipped byte"):
            kill_tree(run.process.pid)
        elif fault == "SIGINT":  # a terminal interrupts the whole group
            os.killpg(run.process.pid, signal.SIGINT)
        elif fault == "second run":
            self._second_run(run)
        elif fault in _OF_SERVERS:
            words = self.chance.choice(["rollout.launch", "sglang::scheduler", "sglang::detokenizer"])
            for process in run.find(words)[:1]:
                kill(process, signal.SIGKILL if fault.startswith("kill") else signal.SIGSTOP)
        elif fault == "cut network":
            _ip("link", "set", self.start.environment[f"{plants.NAMESPACE}_CABLE_0"], "down")

    def _victim(self, run: Run) -> psutil.Process | None:
        """Return a rank. Before torchrun has started them it waits for them; None if the run ends."""
        while run.process.poll() is None:
            if ranks := run.ranks():
                return self.chance.choice(ranks)
            time.sleep(0.05)
        return None

    def _freeze(self, run: Run, victim: psutil.Process) -> None:
        """Freeze a process for some seconds or, if others can notice it, for ever."""
        kill(victim, signal.SIGSTOP)
        if len(run.ranks()) < 2 or self.chance.random() < 0.8:
            time.sleep(self.chance.uniform(0.1, 3))
            kill(victim, signal.SIGCONT)

    def _second_run(self, run: Run) -> None:
        with self.start("second") as second:
            status = self.start.ended(second, {0, 1, 2})
            # torchrun makes 1 of every status.
            if run.process.poll() is None and (status == 0 or _REFUSED not in second.text()):
                raise Failure(f"a second run on the same output ended with {status}:\n{second.text()}")

    def _check_checkpoints(self) -> None:
        for path in checkpoint.complete(self.start.output / "checkpoints"):
            try:
                checkpoint.check(path)
            except BadArgument as error:
                raise Failure(f"a checkpoint with a final name is not whole: {error}") from None

    def _flip(self) -> bool:
        """Flip a bit of the newest checkpoint if there is an older one to continue from; return whether it did."""
        found = checkpoint.complete(self.start.output / "checkpoints")
        if len(found) < 2:
            return False
        file = self.chance.choice(sorted(path for path in found[0].iterdir() if path.suffix == ".distcp"))
        content = bytearray(file.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        file.write_bytes(content)
        return True


@contextlib.contextmanager
def second_host() -> Iterator[dict[str, str]]:
    """Yield the environment of two ranks of which the second runs in a network namespace, with a cable between them."""
    name = f"soak-{os.getpid()}"
    here, there = f"soak{os.getpid() % 100_000}a", f"soak{os.getpid() % 100_000}b"
    with contextlib.ExitStack() as stack:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        _ip("address", "add", f"{_ADDRESSES[0]}/24", "dev", here)
        _ip("-n", name, "address", "add", f"{_ADDRESSES[1]}/24", "dev", there)
        for words in (["link", "set", here], ["-n", name, "link", "set", there], ["-n", name, "link", "set", "lo"]):
            _ip(*words, "up")
        cables = {f"{plants.NAMESPACE}_CABLE_0": here, f"{plants.NAMESPACE}_CABLE_1": there}
        yield {plants.NAMESPACE: name, f"{plants.NAMESPACE}_MASTER": _ADDRESSES[0]} | cables


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)


def _mount(options: str, directory: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True, timeout=20)
