"""A router (sglang-router) in front of the user's servers: asked at the start for the servers, which are then asked.

It passes no weights on, and would send requests to a server that was started again before that has the current ones.
"""

import re
import time

import httpx

from megatron_egrsd.errors import RunError

_POLL = 0.5  # seconds between two looks at a router that knows no server yet


def servers_behind(http: httpx.Client, url: str, patience: float) -> list[str]:
    """URLs of the servers that the router at `url` knows; `url` itself where that is no router.

    Raises:
        RunError: It knows none within `patience` seconds; or one of them takes no weights, because it only prefills or
            decodes, or does not speak HTTP.
    """
    deadline = time.monotonic() + patience
    while (workers := _workers(http, url)) == []:
        if time.monotonic() > deadline:
            raise RunError(f"the router at {url} knew no server within {patience:g} s (rollout.start_timeout)")
        time.sleep(_POLL)
    for worker, kind in workers or []:
        if kind != "regular" or not worker.startswith(("http://", "https://")):
            raise RunError(f"behind the router at {url} is {worker}, a server of type {kind}; weights and requests go "
                           "to regular ones over HTTP alone")  # fmt: skip
    # With --dp-aware it counts every data-parallel rank of a server: http://host:port@rank.
    found = [url] if workers is None else [re.sub(r"@\d+$", "", worker) for worker, _ in workers]
    return list(dict.fromkeys(found))


def _workers(http: httpx.Client, url: str) -> list[tuple[str, str]] | None:
    """(URL, type) of each server of a router; None where `url` is no router: SGLang itself knows no such page."""
    try:
        workers = http.get(f"{url}/workers").json()["workers"]
        return [(worker["url"].rstrip("/"), worker["worker_type"]) for worker in workers]
    except (httpx.TransportError, ValueError, LookupError, TypeError, AttributeError):
        return None
