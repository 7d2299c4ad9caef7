"""Inspection and termination of processes, any of which may end by itself between two calls."""

import contextlib
import signal
from pathlib import Path

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants; empty if it has ended."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_running(process: psutil.Process) -> bool:
    """Return whether a process still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants. All are stopped first, so that none starts another one meanwhile.

    Torch's daemon lives on, as it does when a process is killed: it removes that process's shared memory and ends.
    """
    stopped: set[psutil.Process] = set()
    while found := {process for process in tree(pid) if _name(process) != "torch_shm_manager"} - stopped:
        for process in found:
            kill(process, signal.SIGSTOP)
        stopped |= found
    for process in stopped:
        kill(process)


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def shared_memory() -> set[str]:
    """Return the names of the shared memory that SGLang, torch and NCCL have created on this machine."""
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(("sgl", "torch", "nccl", "psm"))}


def abandoned(names: set[str]) -> set[str]:
    """Return which of these no process has mapped: what runs beside a test creates and ends its own meanwhile."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text()
            names = {name for name in names if name not in text}
    return {name for name in names if (Path("/dev/shm") / name).exists()}
