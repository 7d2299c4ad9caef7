"""SGLang servers: start, await, watch, restart and stop them; or attach to servers that somebody else runs.

A server that has ended or hangs is lost: `mark_lost` starts another server in its place, `recover` awaits its health,
and `rejoin` counts it in again after it has the current weights. The other servers keep working meanwhile. A server is
a group of processes (HTTP server, scheduler, detokenizer). It runs in a session of its own, so the terminal's Ctrl-C
does not reach it, and signals always go to the whole group, by id. `close` ends the servers on an orderly exit; if this
process ends otherwise (SIGTERM, SIGKILL, a crash), the kernel ends them: see launch_guard.py.
"""

import atexit
import contextlib
import itertools
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from megatron_egrsd.config import ModelConfig, ServersConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout import cpu_platform
from megatron_egrsd.rollout.launch_guard import KEY_VARIABLE, PARENT_VARIABLE
from megatron_egrsd.rollout.ports import choose_ports, server_url
from megatron_egrsd.rollout.router import servers_behind
from megatron_egrsd.rollout.scratch import Scratch
from megatron_egrsd.rollout.server_command import server_command
from megatron_egrsd.system import torchrun

T = TypeVar("T")
_POLL = 0.5  # seconds between two checks of a starting server
_TAIL = 1 << 18  # bytes at the end of a log in which its error is looked for
_KILL_TIMEOUT = 5.0  # seconds until the processes of a killed server must have ended
_PORT_TAKEN = "address already in use"  # uvicorn's words
# The last line of a traceback, uvicorn's error about its port, or argparse's error.
_ERROR = re.compile(r"(\[.*\] )?([\w.]*(Error|Exception): .|ERROR: +\[Errno|.*: error: )")


class ServersLost(RunError):
    """Loss of every server with complete weights: the servers must be recovered and the weights pushed again."""


def retry_lost(action: Callable[[], T], recover: Callable[[ServersLost], object]) -> T:
    """Return `action()`; each time that it raises ServersLost, call `recover` with the error and try again.

    This ends: RolloutServers raises another RunError after `rollout.servers.max_restarts` losses.
    """
    while True:
        try:
            return action()
        except ServersLost as lost:
            recover(lost)


class Server:
    """One server: its address and, if this process launched it, its process (leader of its group) and log."""

    def __init__(self, url: str, elsewhere: bool = False):
        self.url = url
        self.elsewhere = elsewhere  # the run launched it on another node, whose first rank restarts it
        self.process: subprocess.Popen | None = None
        self.log: Path | None = None
        self.children: list[psutil.Process] = []  # known after it is healthy
        self.lost = ""  # the reason why it is lost; "" if it is healthy and has the current weights
        self.released: set[str] = set()  # parts of its GPU memory (server_memory.py)

    def ended(self) -> str:
        """Return why a launched server ended (exit code or ended process, last error, log path), or "" if it runs."""
        if self.process is None:
            return ""
        if (code := self.process.poll()) is not None:
            reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        # Without its scheduler the HTTP server runs on for some seconds, and requests to it hang meanwhile.
        elif ended := [child for child in self.children if not _is_running(child)]:
            reason = f"its process {ended[0].pid} is gone"
        else:
            return ""
        return (f"the SGLang server at {self.url} has ended ({reason}): {last_error(self.log)}; "
                f"the whole log is {self.log}")  # fmt: skip

    def find_children(self) -> None:
        """Note the processes of a launched server: it has ended when one of them has."""
        if self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.children = psutil.Process(self.process.pid).children(recursive=True)


class RolloutServers:
    """The servers of a run, as a context manager.

    Args:
        config: Attaches to `config.urls` if given, else launches `config.engines` servers on this host. A router's
            address stands for the servers behind it (router.py).
        model: Checkpoint and dtype that a launched server loads.
        seed: Random seed of the first server. The i-th gets seed + i: with equal seeds all would sample the same.
        log_directory: A launched server writes `sglang-<i>.log` into it.
        wait: False returns without awaiting health; call `await_health` before the first request.
        key: API key of the servers, "" for none. By default that in the variable `config.api_key_variable` or, of
            launched servers, one that is made here.

    Raises:
        BadArgument: The model directory is missing or a requested port is taken; nothing was started.
        RunError: A server died or was not healthy within `config.start_timeout`; none is left running.
    """

    def __init__(self, config: ServersConfig, model: ModelConfig, seed: int, log_directory: Path, wait: bool = True,
                 key: str | None = None):  # fmt: skip
        self.config = config
        self.model = model
        self.seed = seed
        self.servers: list[Server] = []
        self.restarts = 0
        self.adapter = ""  # the name of the adapter that requests ask for; "" for the weights as they are
        self.abandoned = bool(config.urls)  # an abandoned request, or somebody else's, may still run
        self._closed = False
        self._due: list[str] = []  # URLs of lost servers on other nodes that must be restarted
        self.key = api_key(config) if key is None else key
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
                    self.servers.append(Server(server_url(config.host, port)))
                    self._launch(i, seed + i, log_directory / f"sglang-{i}.log")
            if wait:
                self.await_health()
                if config.urls:
                    self._replace_routers()
        except BaseException:
            self.close()
            raise

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @property
    def live(self) -> list[Server]:
        """The servers that are not lost: healthy as far as is known, with the current weights."""
        return [server for server in self.servers if not server.lost]

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request: the API key, if there is one."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def check_alive(self) -> None:
        """Raise ServersLost if a server has ended, with its exit code and the last error line of its log."""
        for server in self.servers:
            if reason := server.ended():
                raise ServersLost(reason)

    def mark_all_lost(self, reason: str, anew: bool = False) -> None:
        """Mark every server lost, as one loss: a sync that one server left is incomplete on all others.

        With `anew` servers that are still marked lost are healthy again, and are lost another time.
        """
        if anew:
            self.rejoin()
        self.mark_lost(self.servers, reason)

    def mark_lost(self, servers: list[Server], reason: str) -> None:
        """Mark `servers` lost, as one loss, and start others in place of those that this process launched.

        Kills the lost servers' processes first, which may take seconds, and waits for no start. Raises RunError if
        servers have already been lost `config.max_restarts` times.
        """
        servers = [server for server in servers if not server.lost]
        if not servers:
            return
        for server in servers:
            server.lost, server.released = reason, set()
        _kill(*(server.process for server in servers if server.process is not None))
        if self.restarts >= self.config.max_restarts:
            raise RunError(
                f"{reason}; the run gives up after {self.restarts} lost servers (rollout.servers.max_restarts)"
            )
        self.restarts += 1
        for server in servers:
            if server.process is not None:
                # A new seed, and a new log: the first log shows why the server ended.
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
        """Await the health of every lost server. Raises RunError if one is not healthy in `config.start_timeout`."""
        self.await_health([server for server in self.servers if server.lost])

    def rejoin(self) -> None:
        """Mark no server lost any more; call this after all of them have the current weights."""
        for server in self.servers:
            server.lost = ""

    def bring_back(self) -> None:
        """Await the health of every lost server and count it in again: servers whose weights never change."""
        self.recover()
        self.rejoin()

    def attach(self, urls: list[str]) -> None:
        """Add healthy servers that the run launched on other nodes."""
        self.servers += [Server(url, elsewhere=True) for url in urls]

    def take_due(self) -> list[str]:
        """Return the URLs of servers on other nodes lost since the last call; their node must `restart` them."""
        due, self._due = self._due, []
        return due

    def restart(self, urls: list[str]) -> None:
        """Restart the servers among `urls` that this process launched, and await their health."""
        own = [server for server in self.servers if server.url in urls and not server.elsewhere]
        self.mark_lost(own, f"lost {', '.join(server.url for server in own)}")
        self.await_health(own)
        for server in own:
            server.lost = ""

    def is_healthy(self, server: Server) -> bool:
        """Return whether `server` reports that it is healthy. SGLang says no if its scheduler is silent for 20 s."""
        with httpx.Client(timeout=30.0, trust_env=False, headers=self.headers) as http:
            return not server.ended() and _is_healthy(http, server, self.key)

    def close(self) -> None:
        """Kill every launched server with its children: they hold nothing worth saving. Idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        _kill(*(server.process for server in self.servers if server.process is not None))
        if self._scratch is not None:
            self._scratch.remove()

    def __enter__(self) -> "RolloutServers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _launch(self, index: int, seed: int, log: Path) -> None:
        """Start the process of the server `index` on the port of its URL."""
        import torch

        config, server = self.config, self.servers[index]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        command = [sys.executable, "-m", "megatron_egrsd.rollout.launch",
                   *server_command(config, self.model, seed, int(server.url.rpartition(":")[2]), device)]  # fmt: skip
        # torchrun's variables describe the training job: SGLang would read its rank and rendezvous from them.
        environment = torchrun.environment_without()
        environment |= {PARENT_VARIABLE: str(os.getpid()), "TMPDIR": str(self._scratch.path)}
        environment |= {KEY_VARIABLE: self.key} if self.key else {}
        if device == "cpu":
            environment |= {"OMP_NUM_THREADS": str(config.cpu_threads), "SGLANG_PLATFORM": cpu_platform.NAME}
        else:  # the servers take consecutive GPUs
            first = int(config.args.get("base_gpu_id", 0)) + index * config.tensor_parallel
            command += ["--base-gpu-id", str(first)]
        with open(log, "wb") as output:
            server.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output,
                                              stderr=subprocess.STDOUT, env=environment,
                                              start_new_session=True)  # fmt: skip
        server.log, server.children = log, []

    def await_health(self, servers: list[Server] | None = None) -> None:
        """Wait until `servers` (default: all) are healthy. Raises RunError if one ends or after `start_timeout`."""
        deadline = time.monotonic() + self.config.start_timeout
        waiting = list(self.servers if servers is None else servers)
        with httpx.Client(timeout=5.0, trust_env=False, headers=self.headers) as http:
            while waiting:
                for server in waiting:
                    if (reason := server.ended()) and not self._move(server):
                        raise RunError(reason)
                for server in [server for server in waiting if _is_healthy(http, server, self.key)]:
                    server.find_children()
                    waiting.remove(server)
                if waiting and time.monotonic() > deadline:
                    server = waiting[0]
                    limit = "rollout.servers.start_timeout"
                    hint = f"; see {server.log}, or raise {limit}" if server.log else ""
                    raise RunError(f"the SGLang server at {server.url} was not healthy within "
                                   f"{self.config.start_timeout:g} s ({limit}){hint}")  # fmt: skip
                if waiting:
                    time.sleep(_POLL)

    def _move(self, server: Server) -> bool:
        """Start a server on another port if its own was taken after it was chosen. Returns False if it was not.

        Only before the first loss: later its address is known elsewhere.
        """
        if self.config.port or self.restarts or _PORT_TAKEN not in last_error(server.log):
            return False
        taken, [port] = server.url, choose_ports(self.config.host, 0, 1)
        server.url = server_url(self.config.host, port)
        print(f"{taken} was taken before the SGLang server used it; starting it at {server.url}", flush=True)
        index = self.servers.index(server)
        self._launch(index, self.seed + index, server.log)
        return True

    def _replace_routers(self) -> None:
        with httpx.Client(timeout=5.0, trust_env=False, headers=self.headers) as http:
            behind = [servers_behind(http, url, self.config.start_timeout) for url in self.urls]
        self.servers = [Server(url) for url in dict.fromkeys(itertools.chain.from_iterable(behind))]
        self.await_health()


def api_key(config: ServersConfig) -> str:
    """Return the key in `config.api_key_variable`. Raises BadArgument if the variable is not set.

    Without such a variable, a new key for servers to be launched: no other program changes their weights, and no other
    server is taken for one of them. "" for servers that run already.
    """
    if not config.api_key_variable:
        return "" if config.urls else secrets.token_hex(16)
    if not (key := os.environ.get(config.api_key_variable, "")):
        raise BadArgument(
            f"rollout.servers.api_key_variable names {config.api_key_variable}, but that variable is not set"
        )
    return key


def _kill(*processes: subprocess.Popen) -> None:
    """Kill servers with all their children, and wait some seconds for their end."""
    for process in processes:
        process.kill()  # its children end too (launch_guard.py); Python's resource tracker cleans up and ends
    deadline = time.monotonic() + _KILL_TIMEOUT
    while any(_signal_group(process, 0) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:
        _signal_group(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, as on a lost file system
            process.wait(_KILL_TIMEOUT)


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to the remaining processes of a server's group. Returns False if there are none."""
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


def _is_healthy(http: httpx.Client, server: Server, key: str) -> bool:
    """Return whether `server` is healthy and, if the run launched it, asks for `key` and takes it.

    Another run's server, which took the port while this one started, answers /health too: that needs no key.
    """
    try:
        if http.get(f"{server.url}/health").status_code != 200:
            return False
        if not key or (server.process is None and not server.elsewhere):
            return True
        without, with_it = (
            http.get(f"{server.url}/model_info", headers={"Authorization": word}).status_code
            for word in ("", f"Bearer {key}")
        )
        return (without, with_it) == (401, 200)
    except httpx.TransportError:
        return False


def last_error(log: Path) -> str:
    """Return the first exception at the end of a log: the later ones of a group of processes follow from it."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - _TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines[-1:] or ["its log is empty"])[0][:500]
