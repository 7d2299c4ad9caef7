"""Many generation requests in flight over the servers, behind a synchronous call.

Dispatch is our own, to the server with the fewest requests in flight: with whole batches of equal prompts a router
(sglang-router) has nothing to add, and it does not forward weight updates.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from megatron_egrsd.config import RolloutConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout.servers import RolloutServers, Server

_WATCH = 0.5  # seconds between two looks at the servers while requests are in flight


@dataclass(frozen=True)
class Generation:
    """One sampled response.

    `log_probs[t]` is the log-probability (nats) of `response_ids[t]` under softmax(logits / temperature). A response
    that stopped ends with the stop token. `finish_reason` is "stop" or "length". `weight_version` is that of the last
    sync, 0 before the first, -1 where the server has a version of its own naming.
    """

    response_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    weight_version: int


class RolloutClient:
    """Samples responses from running servers.

    Args:
        servers: Where to send requests; their death ends a `generate` within a second.
        config: Temperature, response length, concurrency and timeout.
        stop_token_ids: Tokens that end a response, besides the checkpoint's own (generation_config, config).
    """

    def __init__(self, servers: RolloutServers, config: RolloutConfig, stop_token_ids: list[int] | None = None):
        self.servers = servers
        self.config = config
        self.stop_token_ids = list(stop_token_ids or [])

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        *,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Generation]]:
        """`n` responses to each prompt (token ids), in the order of the prompts.

        `on_progress(k)` is called as k further responses are complete. Not callable from inside an event loop.

        Raises:
            BadArgument: A prompt is empty (it would kill SGLang's scheduler), or a size is not positive.
            RunError: A request failed, was aborted or ran into `config.request_timeout`, or a server ended.
        """
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise BadArgument(f"prompt {i} of {len(prompts)} has no tokens; SGLang cannot continue nothing")
        temperature = self.config.temperature if temperature is None else temperature
        max_new_tokens = self.config.max_response_tokens if max_new_tokens is None else max_new_tokens
        if n < 1 or max_new_tokens < 1 or temperature < 0:
            raise BadArgument(f"n = {n} and max_new_tokens = {max_new_tokens} must be positive and temperature = "
                              f"{temperature} not negative")  # fmt: skip
        sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "skip_special_tokens": False}
        if self.stop_token_ids:
            sampling["stop_token_ids"] = self.stop_token_ids
        return asyncio.run(self._generate(prompts, n, sampling, on_progress or (lambda k: None)))

    async def _generate(self, prompts, n, sampling, on_progress) -> list[list[Generation]]:
        in_flight = dict.fromkeys(self.servers.servers, 0)
        slots = asyncio.Semaphore(self.config.max_concurrent_requests)
        results: list[list[Generation]] = [[None] * n for _ in prompts]

        async def sample(session: aiohttp.ClientSession, i: int, j: int) -> None:
            async with slots:
                server = min(in_flight, key=in_flight.get)
                in_flight[server] += 1
                try:
                    results[i][j] = await self._request(session, server, prompts[i], sampling)
                finally:
                    in_flight[server] -= 1
            on_progress(1)

        timeout = aiohttp.ClientTimeout(total=self.config.request_timeout)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            # The samples of one prompt are issued side by side: all but the first find its prefix cached.
            samples = asyncio.gather(*(sample(session, i, j) for i in range(len(prompts)) for j in range(n)))
            watch = asyncio.create_task(self._watch())
            try:
                done, _ = await asyncio.wait({samples, watch}, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    future.result()
            except RunError:
                self.servers.check_alive()  # the better explanation of a broken connection
                raise
            finally:
                samples.cancel()
                watch.cancel()
                await asyncio.gather(samples, watch, return_exceptions=True)
        return results

    async def _watch(self) -> None:
        """Raises when a server has ended; a request to it could otherwise wait for its whole timeout."""
        while True:
            self.servers.check_alive()
            await asyncio.sleep(_WATCH)

    async def _request(self, session: aiohttp.ClientSession, server: Server, prompt: list[int], sampling: dict):
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        try:
            async with session.post(f"{server.url}/generate", json=body) as response:
                if response.status != 200:
                    raise RunError(f"{server.url}/generate refused a prompt of {len(prompt)} tokens with HTTP "
                                   f"{response.status}: {(await response.text())[:300]}")  # fmt: skip
                answer = await response.json()
        except TimeoutError:
            raise RunError(f"{server.url}/generate did not answer within rollout.request_timeout = "
                           f"{self.config.request_timeout:g} s") from None  # fmt: skip
        except aiohttp.ClientError as error:
            raise RunError(f"{server.url}/generate failed: {error or type(error).__name__}") from error
        return parse_generation(answer, server.url)


def parse_generation(answer: dict, url: str) -> Generation:
    """SGLang's answer as a Generation; RunError if it was aborted or contradicts itself."""
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    if reason is None or reason["type"] not in ("stop", "length"):
        message = (reason or {}).get("message", "no reason given")
        raise RunError(f"{url} aborted a generation: {message}")
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    sampled_ids = [entry[1] for entry in meta["output_token_logprobs"]]
    if sampled_ids != answer["output_ids"]:
        raise RunError(f"{url} returned log-probabilities of other tokens than it sampled; "
                       f"{len(answer['output_ids'])} tokens, {len(sampled_ids)} log-probabilities")  # fmt: skip
    version = meta["weight_version"]
    return Generation(sampled_ids, log_probs, reason["type"], int(version) if version.isdecimal() else -1)
