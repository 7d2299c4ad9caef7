"""Ports for servers that take seconds to bind them."""

import random
import socket

from megatron_egrsd.errors import BadArgument

_NOT_OUTGOING = (20000, 32768)  # Linux gives from 32768 on to connections


def choose_ports(host: str, first: int, count: int) -> list[int]:
    """`count` ports of `host`, from `first` on, or any free ones if it is 0; BadArgument naming one that is taken.

    Free ones are from below the range that the kernel gives to outgoing connections: a server needs ten seconds to
    start, in which one of those may take a port that was free.
    """
    if first:
        for port in range(first, first + count):
            if error := _why_not(host, port):
                raise BadArgument(f"rollout.port: port {port} on {host} cannot be used ({error}); "
                                  "free it, choose another, or 0 for any free one")  # fmt: skip
        return list(range(first, first + count))
    free: list[int] = []
    for port in random.SystemRandom().sample(range(*_NOT_OUTGOING), 1000):
        if len(free) < count and not _why_not(host, port):
            free.append(port)
    if len(free) < count:
        raise BadArgument(f"rollout.host: no free port on {host} ({_why_not(host, 0) or 'a thousand were tried'})")
    return free


def _why_not(host: str, port: int) -> str:
    """Why a port cannot be bound; "" if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for SGLang too
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""
