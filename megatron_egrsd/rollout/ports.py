"""Choice of ports for servers that take seconds to bind them."""

import random
import socket

from megatron_egrsd.errors import BadArgument

_NOT_OUTGOING = (20000, 32768)  # Linux uses ports from 32768 on for outgoing connections


def choose_ports(host: str, first: int, count: int) -> list[int]:
    """Return `count` ports of `host`, from `first` on, or any free ports if `first` is 0.

    Free ports are chosen below the range of outgoing connections: a server needs ten seconds to start, and such a
    connection may take the port meanwhile. Raises BadArgument, naming the port, if one is taken.
    """
    if first:
        for port in range(first, first + count):
            if error := _bind_error(host, port):
                raise BadArgument(f"rollout.servers.port: port {port} on {host} cannot be used ({error}); "
                                  "free it, choose another, or 0 for any free one")  # fmt: skip
        return list(range(first, first + count))
    free: list[int] = []
    for port in random.SystemRandom().sample(range(*_NOT_OUTGOING), 1000):
        if len(free) < count and not _bind_error(host, port):
            free.append(port)
    if len(free) < count:
        raise BadArgument(
            f"rollout.servers.host: no free port on {host} ({_bind_error(host, 0) or 'a thousand were tried'})"
        )
    return free


def server_url(host: str, port: int) -> str:
    """Return the URL of a server; an IPv6 address stands in brackets in it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind_error(host: str, port: int) -> str:
    """Return the reason why a port cannot be bound, or "" if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for SGLang too
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""
