"""A router (sglang-router) in front of the user's servers. It is asked once, at the start, for its servers.

Further requests go to the servers: a router passes no weights on, and sends requests to a restarted server too early.
"""

import re
import time

import httpx

from megatron_egrsd.errors import RunError

_POLL = 0.5  # seconds between two requests to a router that knows no server yet


def servers_behind(http: httpx.Client, url: str, patience: float) -> list[str]:
    """Return the URLs of the servers that the router at `url` knows, or `url` itself if it is no router.

    Raises RunError if the router knows no server within `patience` seconds, or if a server accepts no weights because
    it only prefills, only decodes or does not speak HTTP.
    """
    deadline = time.monotonic() + patience
    while (workers := _workers(http, url)) == []:
        if time.monotonic() > deadline:
            raise RunError(f"the router at {url} knew no server within {patience:g} s (rollout.servers.start_timeout)")
        time.sleep(_POLL)
    for worker, kind in workers or []:
        if kind != "regular" or not worker.startswith(("http://", "https://")):
            raise RunError(f"behind the router at {url} is {worker}, a server of type {kind}; weights and requests go "
                           "to regular ones over HTTP alone")  # fmt: skip
    # With --dp-aware a router lists every data-parallel rank of a server: http://host:port@rank.
    found = [url] if workers is None else [re.sub(r"@\d+$", "", worker) for worker, _ in workers]
    return list(dict.fromkeys(found))


def _workers(http: httpx.Client, url: str) -> list[tuple[str, str]] | None:
    """Return (URL, type) of each server of a router, or None if `url` is no router: SGLang itself has no /workers."""
    try:
        workers = http.get(f"{url}/workers").json()["workers"]
        return [(worker["url"].rstrip("/"), worker["worker_type"]) for worker in workers]
    except (httpx.TransportError, ValueError, LookupError, TypeError, AttributeError):
        return None
