"""Start, await, watch, replace and stop SGLang servers; or attach to servers that somebody else runs.

A server that ended or hangs is lost: `mark_lost` starts another one in its place, `recover` awaits it, and it counts
again once it has the current weights (`rejoin`). Meanwhile the others carry on. A server is a group of processes (HTTP
server, scheduler, detokenizer): it gets a session of its own, out of reach of the terminal's Ctrl-C, and is always
signalled as a group, by id. `close` ends it in an orderly exit; where this process has no chance to (SIGTERM, SIGKILL,
a crash), the kernel does: see launch_guard.py.
"""

import atexit
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from megatron_egrsd.config import ModelConfig, RolloutConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout import cpu_platform
from megatron_egrsd.rollout.launch_guard import KEY_VARIABLE, PARENT_VARIABLE
from megatron_egrsd.rollout.ports import choose_ports
from megatron_egrsd.rollout.router import servers_behind
from megatron_egrsd.rollout.scratch import Scratch
from megatron_egrsd.rollout.server_command import server_command
from megatron_egrsd.system import torchrun

_POLL = 0.5  # seconds between two looks at a starting server
_GRACE = 5.0  # seconds a killed server's processes have to be gone
# The end of a traceback, uvicorn's about its port, or argparse's.
_ERROR = re.compile(r"(\[.*\] )?([\w.]*(Error|Exception): .|ERROR: +\[Errno|.*: error: )")


class ServersLost(RunError):
    """No server, or none that holds whole weights, is left: they must be recovered and given the weights again."""


class Server:
    """One server: its address and, where this process launched it, its process (leader of its group) and log."""

    def __init__(self, url: str, elsewhere: bool = False):
        self.url = url
        self.elsewhere = elsewhere  # the run launched it on another node, whose first rank starts it again
        self.process: subprocess.Popen | None = None
        self.log: Path | None = None
        self.children: list[psutil.Process] = []  # known once it is healthy
        self.lost = ""  # why it does not count, until it has the current weights again
        self.released: set[str] = set()  # parts of its GPU memory (server_memory.py)

    def ended(self) -> str:
        """Why a launched server has ended: exit code or ended process, last error line and log path; "" if it runs."""
        if self.process is None:
            return ""
        if (code := self.process.poll()) is not None:
            reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        # Without its scheduler the HTTP server goes on for some seconds, and requests to it hang meanwhile.
        elif ended := [child for child in self.children if not _is_running(child)]:
            reason = f"its process {ended[0].pid} is gone"
        else:
            return ""
        return (f"the SGLang server at {self.url} has ended ({reason}): {last_error(self.log)}; "
                f"the whole log is {self.log}")  # fmt: skip


class RolloutServers:
    """The servers of a run, as a context manager.

    Args:
        config: Attaches to `config.urls` if given, else launches `config.engines` servers on this host. A router's
            address stands for the servers behind it (router.py).
        model: Checkpoint and type that a launched server loads.
        seed: Random seed of the first server; the i-th gets seed + i, or all would sample the same.
        log_directory: A launched server writes `sglang-<i>.log` here.
        wait: False returns without awaiting health; call `await_health` before the first request.
        key: API key of the servers; "" takes the one that `config.api_key_variable` names, if any.

    Raises:
        BadArgument: The model directory is missing or a requested port is taken; nothing was started.
        RunError: A server died or was not healthy within `config.start_timeout`; none is left running.
    """

    def __init__(self, config: RolloutConfig, model: ModelConfig, seed: int, log_directory: Path, wait: bool = True,
                 key: str = ""):  # fmt: skip
        self.config = config
        self.model = model
        self.seed = seed
        self.servers: list[Server] = []
        self.restarts = 0
        self.abandoned = bool(config.urls)  # a request that was given up, or somebody else's, may still run
        self._closed = False
        self._due: list[str] = []  # servers elsewhere that were lost and not yet started again
        self.key = key or api_key(config)
        self._scratch: Scratch | None = None
        if config.urls:
            self.servers = [Server(url.rstrip("/")) for url in config.urls]
        else:
            if not (Path(model.path) / "config.json").is_file():
                raise BadArgument(f"model.path is {model.path!r}, but there is no config.json in it; "
                                  "give the directory of a Hugging Face checkpoint")  # fmt: skip
            ports = choose_ports(config.host, config.port, config.engines)
            self._scratch = Scratch()
            atexit.register(self.close)
        try:
            if not config.urls:
                log_directory.mkdir(parents=True, exist_ok=True)
                for i, port in enumerate(ports):
                    self.servers.append(Server(f"http://{config.host}:{port}"))
                    self._launch(i, seed + i, log_directory / f"sglang-{i}.log")
            if wait:
                self.await_health()
                if config.urls:
                    self._look_behind_routers()
        except BaseException:
            self.close()
            raise

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @property
    def live(self) -> list[Server]:
        """The servers that are healthy, as far as is known, and hold the current weights."""
        return [server for server in self.servers if not server.lost]

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request: the API key, if there is one."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def check_alive(self) -> None:
        """RunError naming the first server that has ended, with exit code and last error line of its log."""
        for server in self.servers:
            if reason := server.ended():
                raise RunError(reason)

    def mark_lost(self, server: Server, reason: str) -> None:
        """Count `server` out and, where we launched it, start another one in its place; returns at once.

        Raises:
            RunError: `config.max_restarts` times servers have been lost before.
        """
        self._mark_lost([server], reason)

    def mark_all_lost(self, reason: str) -> None:
        """`mark_lost` for every server: what one of them did not take part in leaves the others half done."""
        self._mark_lost(self.servers, reason)

    def _mark_lost(self, servers: list[Server], reason: str) -> None:
        """One loss, however many servers it takes."""
        servers = [server for server in servers if not server.lost]
        if not servers:
            return
        for server in servers:
            server.lost, server.released = reason, set()
        _end(*(server.process for server in servers if server.process is not None))
        if self.restarts >= self.config.max_restarts:
            raise RunError(f"{reason}; the run gives up after {self.restarts} lost servers (rollout.max_restarts)")
        self.restarts += 1
        for server in servers:
            if server.process is not None:
                # Fresh random numbers and a log of its own: the first start's log says why it ended.
                index = self.servers.index(server)
                log = server.log.with_name(f"sglang-{index}-restart-{self.restarts}.log")
                what = f"starting it again ({self.restarts} of {self.config.max_restarts} restarts)"
                self._launch(index, self.seed + index + len(self.servers) * self.restarts, log)
            else:
                what = f"waiting for {server.url} to come back"
                if server.elsewhere:
                    self._due.append(server.url)
            print(f"{reason}; {what}", flush=True)

    def recover(self) -> None:
        """Await the health of every lost server; RunError where one does not come back in `config.start_timeout`."""
        self.await_health([server for server in self.servers if server.lost])

    def rejoin(self) -> None:
        """Count every server in again: all of them have the current weights."""
        for server in self.servers:
            server.lost = ""

    def attach(self, urls: list[str]) -> None:
        """Count in healthy servers that the run launched on other nodes."""
        self.servers += [Server(url, elsewhere=True) for url in urls]

    def take_due(self) -> list[str]:
        """The attached servers that were lost since the last call: `restart` them where they were launched."""
        due, self._due = self._due, []
        return due

    def restart(self, urls: list[str]) -> None:
        """Start those of `urls` that were launched here anew, and await their health."""
        own = [server for server in self.servers if server.url in urls and not server.elsewhere]
        self._mark_lost(own, f"lost {', '.join(server.url for server in own)}")
        self.await_health(own)
        for server in own:
            server.lost = ""

    def is_healthy(self, server: Server, timeout: float = 30.0) -> bool:
        """Whether `server` answers that it is well. SGLang itself says no after 20 s without sign of its scheduler."""
        with httpx.Client(timeout=timeout, trust_env=False, headers=self.headers) as http:
            return not server.ended() and _is_healthy(http, server.url)

    def close(self) -> None:
        """End every launched server with its children, at once: they hold nothing worth saving. Idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        _end(*(server.process for server in self.servers if server.process is not None))
        if self._scratch is not None:
            self._scratch.remove()

    def __enter__(self) -> "RolloutServers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _launch(self, index: int, seed: int, log: Path) -> None:
        """Start the process of the server at `index`, on the port of its url."""
        import torch

        config, server = self.config, self.servers[index]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        command = [sys.executable, "-m", "megatron_egrsd.rollout.launch",
                   *server_command(config, self.model, seed, int(server.url.rpartition(":")[2]), device)]  # fmt: skip
        # torchrun's variables describe the training job: SGLang would take its rank and rendezvous from them.
        environment = torchrun.environment_without()
        environment |= {PARENT_VARIABLE: str(os.getpid()), "TMPDIR": str(self._scratch.path)}
        environment |= {KEY_VARIABLE: self.key} if self.key else {}
        if device == "cpu":
            environment |= {"OMP_NUM_THREADS": str(config.cpu_threads), "SGLANG_PLATFORM": cpu_platform.NAME}
        else:  # the servers stand side by side from the user's base_gpu_id on
            first = int(config.server_args.get("base_gpu_id", 0)) + index * config.engine_tensor_parallel
            command += ["--base-gpu-id", str(first)]
        with open(log, "wb") as output:
            server.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output,
                                              stderr=subprocess.STDOUT, env=environment,
                                              start_new_session=True)  # fmt: skip
        server.log, server.children = log, []

    def await_health(self, servers: list[Server] | None = None) -> None:
        """Return when these servers (all) are healthy; RunError if one ends or `config.start_timeout` passes."""
        deadline = time.monotonic() + self.config.start_timeout
        waiting = list(self.servers if servers is None else servers)
        with httpx.Client(timeout=5.0, trust_env=False, headers=self.headers) as http:
            while waiting:
                for server in waiting:
                    if reason := server.ended():
                        raise RunError(reason)
                    self._note(server)
                for server in [server for server in waiting if _is_healthy(http, server.url)]:
                    server.children = self._note(server)
                    waiting.remove(server)
                if waiting and time.monotonic() > deadline:
                    server = waiting[0]
                    hint = f"; see {server.log}, or raise rollout.start_timeout" if server.log else ""
                    raise RunError(f"the SGLang server at {server.url} was not healthy within "
                                   f"{self.config.start_timeout:g} s (rollout.start_timeout){hint}")  # fmt: skip
                if waiting:
                    time.sleep(_POLL)

    def _look_behind_routers(self) -> None:
        with httpx.Client(timeout=5.0, trust_env=False, headers=self.headers) as http:
            behind = [servers_behind(http, url, self.config.start_timeout) for url in self.urls]
        self.servers = [Server(url) for url in dict.fromkeys(itertools.chain.from_iterable(behind))]
        self.await_health()

    def _note(self, server: Server) -> list[psutil.Process]:
        """The processes of a launched server, whose shared memory is remembered from as early on as possible."""
        if server.process is None:
            return []
        try:
            children = psutil.Process(server.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._scratch.note(children)
        return children


def api_key(config: RolloutConfig) -> str:
    """The key in `config.api_key_variable`, "" where none is named; BadArgument where the variable is not set."""
    if not config.api_key_variable:
        return ""
    if not (key := os.environ.get(config.api_key_variable, "")):
        raise BadArgument(f"rollout.api_key_variable names {config.api_key_variable}, but that variable is not set")
    return key


def _end(*processes: subprocess.Popen) -> None:
    """Kill servers with all their children, and wait until they are gone."""
    for process in processes:
        process.kill()  # its children follow (launch_guard.py); Python's resource tracker tidies up and ends
    deadline = time.monotonic() + _GRACE
    while any(_signal_group(process, 0) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:
        _signal_group(process, signal.SIGKILL)
        process.wait(_GRACE)


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to all that is left of a server's process group; False if nothing is."""
    process.poll()  # reaps the leader: a zombie would count as alive
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_healthy(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def last_error(log: Path, tail: int = 1 << 18) -> str:
    """The exception that started the end of a log: later ones of a group of processes are its consequences."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - tail))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines[-1:] or ["its log is empty"])[0][:500]
