"""Client of the servers: a synchronous call that keeps many generation requests in flight.

A failed request is retried. A server that ends or hangs counts as lost, and its requests go to the other servers. Each
request goes to the server with the fewest requests in flight; router.py explains why no router dispatches them.
"""

import asyncio
import contextlib
import resource
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from megatron_egrsd.config import EvaluationConfig, RolloutConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout.generation import LARGE, NOTHING, Generation, read_answer, read_apart
from megatron_egrsd.rollout.servers import RolloutServers, Server, ServersLost

_PROCESS_CHECK = 0.5  # seconds between two checks of the servers' processes while requests are in flight
_HEALTH_CHECK = 5.0  # seconds between two requests to a server's /health
_OTHER_FILES = 256  # files that the process may have open besides its requests
_UNLIMITED_FILES = 1 << 20  # stands for the number of files if the system sets no limit
_ABORT_TIMEOUT = 5.0  # seconds that a server may take to accept an abort
ROUTES = {"return_routed_experts": True}  # of a request


class _RequestFailed(Exception):
    """A failure of a request that a retry may cure."""


class RolloutClient:
    """Client that samples responses from running servers.

    Args:
        servers: The servers that get the requests. The end of a server is detected within a second.
        config: Temperature, response length, concurrency, timeouts and retries.
        stop_token_ids: Tokens that end a response, besides the checkpoint's own (generation_config, config).
        check: Called twice a second while requests are in flight. An exception that it raises ends `generate`.
    """

    def __init__(
        self,
        servers: RolloutServers,
        config: RolloutConfig,
        stop_token_ids: list[int] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.servers = servers
        self.config = config
        self.stop_token_ids = list(stop_token_ids or [])
        self.check = check
        self.stopping = False  # true from `abort` on
        self._requests: dict[Server, set[asyncio.Task]] = {}

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        *,
        settings: RolloutConfig | EvaluationConfig | None = None,
        max_new_tokens: int | None = None,
        done: dict[tuple[int, int], Generation] | None = None,
        finished: Callable[[int, int, Generation], object] = lambda *_: None,
        seeds: Callable[[int, int], int] | None = None,
        routes: bool = False,
    ) -> list[list[Generation]]:
        """Sample `n` responses to each prompt (token ids), in the order of the prompts. Not for use in an event loop.

        `settings` holds temperature, top_p and top_k; None is `config`. The log-probs that SGLang returns are those at
        this temperature, before top_p and top_k.

        `done` collects the j-th response to the i-th prompt under (i, j). After ServersLost and the recovery of the
        servers, a second call with the same `done` samples only the missing responses. `finished(i, j, response)` is
        called for each response and should return at once. `seeds(i, j)` is the seed of a response; only deterministic
        servers use it. `routes` asks for the experts of every token.

        Raises:
            BadArgument: A prompt is empty (it would kill SGLang's scheduler).
            ServersLost: No server is left. The servers that this run launched are being restarted.
            RunError: A server refused a prompt, a request failed on a healthy server more than
                `config.servers.request_retries` times, or too many servers were lost.
        """
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise BadArgument(f"prompt {i} of {len(prompts)} has no tokens; SGLang cannot continue nothing")
        max_new_tokens = self.config.max_response_tokens if max_new_tokens is None else max_new_tokens
        sampling = self.sampling(settings or self.config, max_new_tokens)
        done = {} if done is None else done
        asyncio.run(self._generate(prompts, n, sampling, done, finished, seeds, ROUTES if routes else {}))
        return [[done[i, j] for j in range(n)] for i in range(len(prompts))]

    def sampling(self, settings: RolloutConfig | EvaluationConfig, max_new_tokens: int) -> dict[str, Any]:
        """Return SGLang's sampling parameters."""
        parameters: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_new_tokens": max_new_tokens,
            "skip_special_tokens": False,
        }
        if settings.top_p < 1:
            parameters["top_p"] = settings.top_p
        if settings.top_k:
            parameters["top_k"] = settings.top_k
        if self.stop_token_ids:
            parameters["stop_token_ids"] = self.stop_token_ids
        return parameters

    async def _generate(self, prompts, n: int, sampling: dict, done: dict, finished, seeds, more: dict) -> None:
        # Requests for the same prompt are adjacent: all but the first find its prefix cached.
        missing = [(i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in done]
        slots = self.slots()

        async def sample_one(session: aiohttp.ClientSession, i: int, j: int) -> None:
            async with slots:
                seed = {"sampling_seed": seeds(i, j)} if seeds else {}
                body = {"input_ids": prompts[i], "sampling_params": sampling | seed} | more
                done[i, j] = await self.request_one(session, body)
                finished(i, j, done[i, j])

        await self.serve(lambda session: asyncio.gather(*(sample_one(session, i, j) for i, j in missing)))

    def slots(self) -> asyncio.Semaphore:
        """Return a semaphore with one slot for every request that may be in flight over all servers."""
        wanted = self.config.servers.max_concurrent_requests * len(self.servers.servers)
        soft, hard = (_UNLIMITED_FILES if limit < 0 else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
        number = max(1, min(wanted, hard - _OTHER_FILES))  # every request is a connection
        if soft < number + _OTHER_FILES:  # the soft limit is 1,024 in many shells
            resource.setrlimit(resource.RLIMIT_NOFILE, (number + _OTHER_FILES, hard))
        return asyncio.Semaphore(number)

    async def serve(self, work: Callable[[aiohttp.ClientSession], Awaitable]) -> None:
        """Await `work`, which sends its requests by `request_one`, and watch the servers meanwhile."""
        self.stopping = False
        self._requests = {server: set() for server in self.servers.servers}
        timeout = aiohttp.ClientTimeout(total=self.config.servers.request_timeout)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self.servers.headers) as session:
            samples = asyncio.ensure_future(work(session))
            watches = [self._watch_processes(), *(self._watch_health(session, s) for s in self.servers.live)]
            tasks = {samples, *map(asyncio.ensure_future, watches)}
            try:
                while not samples.done():
                    finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in finished:
                        task.result()
                    tasks -= finished  # the watch of a lost server ends
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def request_one(self, session: aiohttp.ClientSession, body: dict) -> Generation:
        """Sample one response from any server, partial if `stopping`. Raises ServersLost if no server is left."""
        failures = 0
        while not self.stopping:
            server = min(self.servers.live, key=lambda s: len(self._requests[s]), default=None)
            if server is None:
                raise ServersLost("; ".join(s.lost for s in self.servers.servers))
            request = asyncio.ensure_future(self._request(session, server, body))
            self._requests[server].add(request)
            try:
                await asyncio.wait({request})
            finally:
                self.servers.abandoned |= request.cancel()  # still running only if this task is cancelled itself
                self._requests[server].discard(request)
            if request.cancelled():  # its server was lost
                continue
            try:
                return request.result()
            except _RequestFailed as error:
                self.servers.abandoned = True
                failures += 1
                if failures > self.config.servers.request_retries:
                    if await asyncio.to_thread(self.servers.is_healthy, server):
                        raise RunError(f"{error}; {failures} attempts (rollout.servers.request_retries)") from None
                    self._lose(server, str(error))
                    failures = 0
                await asyncio.sleep(0.1 * 2**failures)
        return NOTHING

    async def abort(self, session: aiohttp.ClientSession) -> None:
        """Stop all requests; they return partial responses. A request still on its way to a server may be missed."""
        self.stopping = True

        async def abort_all(server: Server) -> None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # the watches handle a server that fails
                timeout, everything = aiohttp.ClientTimeout(total=_ABORT_TIMEOUT), {"abort_all": True}
                async with session.post(f"{server.url}/abort_request", json=everything, timeout=timeout):
                    pass

        await asyncio.gather(*map(abort_all, self.servers.live))

    def _lose(self, server: Server, reason: str) -> None:
        self.servers.mark_lost([server], reason)
        for request in self._requests[server]:
            request.cancel()

    async def _watch_processes(self) -> None:
        """Lose servers whose process has ended: a request to such a server could wait for its whole timeout."""
        while True:
            self.check()
            for server in self.servers.live:
                if reason := server.ended():
                    self._lose(server, reason)
            await asyncio.sleep(_PROCESS_CHECK)

    async def _watch_health(self, session: aiohttp.ClientSession, server: Server) -> None:
        """Lose `server` if it has not been healthy for `config.servers.health_timeout` seconds."""
        patience, last = self.config.servers.health_timeout, time.monotonic()
        while not server.lost:
            await asyncio.sleep(min(_HEALTH_CHECK, patience / 4))
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{server.url}/health", timeout=aiohttp.ClientTimeout(total=patience)) as answer:
                    if answer.status == 200:
                        last = time.monotonic()
            if time.monotonic() - last > patience and not server.lost:
                self._lose(server, f"the SGLang server at {server.url} has not been healthy for {patience:g} s "
                                   "(rollout.servers.health_timeout)")  # fmt: skip

    async def _request(self, session: aiohttp.ClientSession, server: Server, body: dict) -> Generation:
        url = f"{server.url}/generate"
        adapter = {"lora_path": self.servers.adapter} if self.servers.adapter else {}
        try:
            async with session.post(url, json=body | adapter | {"return_logprob": True}) as response:
                if 400 <= response.status < 500 and response.status not in (408, 429):
                    raise RunError(f"{url} refused a prompt of {len(body['input_ids'])} tokens with HTTP "
                                   f"{response.status}: {(await response.text())[:300]}")  # fmt: skip
                if response.status != 200:
                    raise _RequestFailed(f"{url} failed with HTTP {response.status}: {(await response.text())[:300]}")
                answer = await response.read()
            large, stopping = len(answer) > LARGE, self.stopping
            generation = (
                await asyncio.to_thread(read_apart, answer, stopping) if large else read_answer(answer, stopping)
            )
            if "return_routed_experts" in body and generation.response_ids and not generation.routes:
                raise RunError(f"{server.url} does not say which experts it chose; start it with "
                               "--enable-return-routed-experts, or set rollout.routing_replay false")  # fmt: skip
            asked, sampled = body["sampling_params"]["max_new_tokens"], len(generation.response_ids)
            if generation.finish_reason == "length" and sampled < asked:
                raise RunError(f"{server.url} cut a response after {sampled} of {asked} tokens: with its prompt of "
                               f"{len(body['input_ids'])} it fills the KV cache or the context length; give the server "
                               "room for more tokens")  # fmt: skip
            return generation
        except TimeoutError:
            raise _RequestFailed(f"{url} did not answer within rollout.servers.request_timeout = "
                                 f"{self.config.servers.request_timeout:g} s") from None  # fmt: skip
        except (aiohttp.ClientError, ValueError) as error:  # ValueError: the answer is no JSON, or not SGLang's
            raise _RequestFailed(f"{url} failed: {error or type(error).__name__}") from error
