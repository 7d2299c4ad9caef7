"""Administrative requests to all servers at once, with one deadline."""

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from megatron_egrsd.errors import RunError
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost


class Control:
    """Client for requests other than generation: weights, versions, memory. Used by one process.

    The end of a server is detected while the others answer. `timeout` is the seconds from `start_clock` to the deadline
    of all requests. `only_here` leaves out servers that were launched on other nodes.
    """

    def __init__(self, servers: RolloutServers, timeout: float, only_here: bool = False):
        self.servers, self.timeout = servers, timeout
        self.urls = [server.url for server in servers.servers if not (only_here and server.elsewhere)]
        self._http = httpx.Client(timeout=timeout, trust_env=False, headers=servers.headers)
        self._threads = ThreadPoolExecutor(len(self.urls), thread_name_prefix="control")
        self.deadline = time.monotonic() + timeout  # of all requests, until `start_clock` sets another

    def start_clock(self) -> float:
        """Start the timeout now; returns the present time."""
        now = time.monotonic()
        self.deadline = now + self.timeout
        return now

    def await_idle(self) -> None:
        """Abort abandoned requests: while they run, SGLang accepts no weights and releases no memory.

        Raises the errors of `on_all`.
        """
        if self.servers.abandoned:
            self.on_all("abort_request", {"abort_all": True})
            self.on_all(f"flush_cache?timeout={self.timeout:g}", {})  # returns when nothing runs
            self.servers.abandoned = False

    def on_all(self, endpoint: str, body: dict | Sequence[dict | None],
               meanwhile: Callable[[Callable[[], None]], None] | None = None) -> list[dict[str, Any]]:  # fmt: skip
        """Send a POST to every server at once, run `meanwhile` until they answer, and return the answers.

        A list holds one body per server, None for a server that is left out. `meanwhile` gets a function that raises
        if a request has failed: then that server will not take part in a broadcast.

        Raises ServersLost if a server has ended, hangs, or its answer is not SGLang's, RunError if one refused.
        """
        bodies = [body] * len(self.urls) if isinstance(body, dict) else body
        requests = [self._threads.submit(self.request, "POST", url, endpoint, b)
                    for url, b in zip(self.urls, bodies, strict=True) if b is not None]  # fmt: skip
        if meanwhile is not None:
            try:
                meanwhile(lambda: _raise_failed(requests))
            except RunError as error:
                wait(requests, timeout=1.0)  # a refusal explains more than the failed broadcast that it caused
                _raise_failed(requests)
                self.servers.check_alive()
                raise ServersLost(str(error)) from error
        while wait(requests, timeout=0.2).not_done:
            _raise_failed(requests)
            self.servers.check_alive()
        return [request.result() for request in requests]

    def request(self, method: str, url: str, endpoint: str, body: dict | None = None) -> dict[str, Any]:
        """Return one server's answer, {} if it is empty. Raises the errors of `on_all`."""
        remaining = self.deadline - time.monotonic()
        try:
            response = self._http.request(method, f"{url}/{endpoint}", json=body, timeout=max(0.1, remaining))
        except httpx.TimeoutException:
            raise ServersLost(f"{url}/{endpoint} did not answer within rollout.sync.timeout = "
                              f"{self.timeout:g} s") from None  # fmt: skip
        except httpx.TransportError as error:
            reason = error or type(error).__name__
            raise ServersLost(f"{url}/{endpoint} failed: {reason}; is the server alive?") from error
        try:
            answer = (response.json() if "json" in response.headers.get("content-type", "") else None) or {}
        except ValueError:
            raise ServersLost(f"{url}/{endpoint} answered with something that is not JSON") from None
        if response.status_code != 200 or answer.get("success") is False:
            reason = answer.get("message") or response.text[:300]
            raise RunError(f"{url}/{endpoint} refused with HTTP {response.status_code}: {reason}")
        return answer

    def tell(self, endpoint: str, body: dict, timeout: float) -> None:
        """Send a POST to one server after the other and ignore failures."""
        for url in self.urls:
            with contextlib.suppress(httpx.HTTPError):  # the server may be ending
                self._http.post(f"{url}/{endpoint}", json=body, timeout=timeout)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()


def _raise_failed(requests: list[Future]) -> None:
    for request in requests:
        if request.done():
            request.result()
