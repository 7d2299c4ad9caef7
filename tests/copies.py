"""`python -m MODULE` as a copy of a process that has imported what the module needs, instead of a new interpreter.

SGLang's server takes 50 s of CPU to start and a training rank 8 s, almost all of it imports. Inside `Source.copied()`,
subprocess.Popen forks such a process instead of starting one; all else is as it was: the copy is a child of the process
that asked for it, with its own session, streams, environment and command line, and copies start copies. Tests of the
start itself use `not_copied()`.

`_serve` runs in a process that has imported everything and has one thread. Requests reach it over a socket; it forks
twice, so that the copy falls to the nearest ancestor that adopts orphans (PR_SET_CHILD_SUBREAPER): the one that asked.
"""

import atexit
import contextlib
import ctypes
import fcntl
import importlib
import inspect
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_egrsd.rollout import cpu_platform

_IMPORTED = (
    "megatron_egrsd.rollout.launch", "sglang.launch_server", "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager", "megatron_egrsd.cli",
    "megatron_egrsd.train", "megatron_egrsd.rewards.verifier", "megatron_egrsd.rollout.generation",
    "torch.distributed.run", "torch.utils.tensorboard", "setproctitle",
)  # fmt: skip
_MODULES = ("megatron_egrsd.cli", "megatron_egrsd.rollout.launch", "megatron_egrsd.system.worker_process",
            "torch.distributed.run")  # fmt: skip
FIRST_VARIABLE = "MEGATRON_EGRSD_TESTS_FIRST"  # names ("module:function") that a copy calls before its module
_START_COPIES = ("megatron_egrsd.cli", "torch.distributed.run")
_TITLE = "the process that copies are made of"
_DEATH_SIGNAL, _SET_SUBREAPER, _GET_SUBREAPER = 1, 36, 37  # of prctl(2)
_ABOVE = 256  # received files are moved here before they get their numbers
_Popen = subprocess.Popen
_source: socket.socket | None = None


class Popen(_Popen):
    """subprocess.Popen that copies if the command is `python [-u] -m` and one of _MODULES."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        words = [os.fspath(word) for word in args] if not isinstance(args, str | bytes) else []
        words[1:2] = [] if words[1:2] == ["-u"] else words[1:2]
        if _source is None or words[:2] != [sys.executable, "-m"] or words[2] not in _MODULES:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, new_session, _ = rest
        streams = [number if given == -1 else given for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        request = {
            "words": words[2:], "cwd": os.fspath(cwd or os.getcwd()), "new_session": bool(new_session),
            "environment": dict(os.environ if env is None else env), "numbers": [0, 1, 2, *pass_fds],
        }  # fmt: skip
        self.pid = _ask(request, [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        return None


class Source:
    """The first process that copies are made of, as a context manager. Its imports take 20 s of CPU."""

    def __enter__(self) -> "Source":
        self._requests, theirs = _pair()
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"from tests import copies; copies._import_and_serve({theirs.fileno()})",
        ]
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SGLANG_PLATFORM": cpu_platform.NAME}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.process = _Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        if self._requests.recv(100) != b"ready":
            raise RuntimeError("the process that copies are made of has ended")
        return self

    def __exit__(self, *_) -> None:
        self._requests.close()
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def copied(self) -> Iterator[None]:
        """Make copies of this process's `python -m MODULE`, and let these copies do so too."""
        with _copying(self._requests):
            yield


@contextlib.contextmanager
def not_copied() -> Iterator[None]:
    """Start new interpreters again."""
    with _copying(None):
        yield


def rank(process: psutil.Process) -> int:
    """Return torchrun's rank of a process. The kernel shows a copy's old environment; its command line has the rank."""
    words = [word for word in process.cmdline() if word.startswith("RANK=")]
    return int(words[0].removeprefix("RANK=") if words else process.environ().get("RANK", "0"))


@contextlib.contextmanager
def _copying(requests: socket.socket | None) -> Iterator[None]:
    global _source
    before, _source = _source, requests
    subprocess.Popen = Popen if requests else _Popen
    try:
        yield
    finally:
        _source = before
        subprocess.Popen = Popen if before else _Popen


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # an environment is sent as one packet
    return ours, theirs


def _ask(request: dict, files: list[int]) -> int:
    with adopting_orphans():
        socket.send_fds(_source, [json.dumps(request).encode()], files)
        return int(_source.recv(100))


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Let descendants whose parent ends become children of this process, as long as this lasts."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(_GET_SUBREAPER, ctypes.byref(before))
    prctl(_SET_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_SET_SUBREAPER, before.value)


def _import_and_serve(number: int) -> None:
    """What the first process does."""
    subprocess.Popen = Popen  # before anybody imports its name
    for name in _IMPORTED:
        importlib.import_module(name)
    import setproctitle

    setproctitle.setproctitle(_TITLE)
    requests = socket.socket(fileno=number)
    requests.send(b"ready")
    _serve(requests)


def _serve(requests: socket.socket) -> None:
    """Make the copies that are asked for, until the process that asks has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        content, files, _, _ = socket.recv_fds(requests, 1 << 20, 64)
        if not content:
            os._exit(0)
        readable, writable = os.pipe()
        if not (middle := os.fork()):
            middle = os.getpid()
            if child := os.fork():
                os.write(writable, str(child).encode())
                os._exit(0)
            while os.getppid() == middle:
                time.sleep(0.001)
            _become(json.loads(content), files)
        os.waitpid(middle, 0)
        requests.send(os.read(readable, 100))
        for file in (readable, writable, *files):
            os.close(file)


def _become(request: dict, files: list[int]) -> None:
    """Run the module in this process, as `python -m` would. Does not return."""
    global _source
    status = 1
    try:
        if request["new_session"]:
            os.setsid()
        os.chdir(request["cwd"])
        moved = [fcntl.fcntl(file, fcntl.F_DUPFD, _ABOVE) for file in files]
        numbers = sorted(request["numbers"])
        for start, end in zip(numbers, [*numbers[1:], 1 << 16], strict=True):
            os.closerange(start + 1, min(end, _ABOVE))
        for file, number in zip(moved, request["numbers"], strict=True):
            os.dup2(file, number)
        os.closerange(_ABOVE, 1 << 16)
        _renew(request)
        module, *words = request["words"]
        if module in _START_COPIES:
            _source = _own_source()
        if module.endswith(".launch"):
            _fork_children()
        if module == "torch.distributed.run":
            # It notes who called at every step of its rendezvous; inspect looks for that in all modules: 3 s of CPU.
            inspect.getmodule = lambda *_: None
        sys.argv = [module, *words]
        for first in os.environ.get(FIRST_VARIABLE, "").split():
            name, _, function = first.partition(":")
            getattr(importlib.import_module(name), function)()
        sys.stdout.reconfigure(line_buffering=True)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
            if isinstance(exit_.code, str):
                print(exit_.code, file=sys.stderr)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _renew(request: dict) -> None:
    """Give this process what a new interpreter would have: environment, paths, signals, randomness, command line."""
    import numpy
    import setproctitle
    import torch

    environment = request["environment"]
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [request["cwd"], *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    random.seed()
    numpy.random.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))
    rank = f" RANK={environment['RANK']}" if "RANK" in environment else ""
    setproctitle.setproctitle(" ".join([sys.executable, "-m", *request["words"]]) + rank)


def _own_source() -> socket.socket:
    """Fork a process that this one can ask for copies; it ends with this one."""
    ours, theirs = _pair()
    if not os.fork():
        ours.close()
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        import setproctitle

        setproctitle.setproctitle(_TITLE)
        _serve(theirs)
    theirs.close()
    return ours


def _fork_children() -> None:
    """Let SGLang's server fork its scheduler and detokenizer instead of spawning them, each bound to its parent."""
    from megatron_egrsd.rollout.launch_guard import die_with_parent

    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None
    os.register_at_fork(after_in_child=die_with_parent)
