"""Partial responses: stopped when the weights change, continued with the next weights.

The tokens of a partial response are kept here and not in SGLang, where they would end with the server. They are sent
again as a part of the prompt: their KV cache is computed from scratch, by the weights that continue the response.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import aiohttp

from megatron_egrsd.rollout.client import ROUTES, RolloutClient
from megatron_egrsd.rollout.generation import Generation

_POLL = 0.02  # seconds between two looks for added responses and for `stop`


class SamplingPhase:
    """The sampling between two changes of the weights: in `thread`, until `stop`. For one calling thread.

    The earliest responses get the slots of `client` first.
    """

    def __init__(self, client: RolloutClient, thread: ThreadPoolExecutor):
        self.client = client
        self._added: list[tuple[list[int], list[Generation], Callable[[], None]]] = []
        self._stop = False
        self._slots: asyncio.Semaphore | None = None  # from the beginning of the sampling on
        self.future: Future = thread.submit(lambda: asyncio.run(client.serve(self._run)))

    def add(self, prompt: list[int], responses: list[Generation], done: Callable[[], None]) -> None:
        """Continue `responses` to `prompt` in place, NOTHING from its start; call `done` when all are finished."""
        self._added.append((prompt, responses, done))

    def stop(self) -> None:
        """Block until no request is in flight; unfinished responses are partial responses then.

        Raises ServersLost if no server was left: the tokens that they had sampled since the last stop are lost with
        them. Raises the RunErrors of RolloutClient.generate, and any error of `done`.
        """
        self._stop = True
        self.future.result()

    async def _run(self, session: aiohttp.ClientSession) -> None:
        self._slots = self.client.slots()
        tasks: list[asyncio.Task] = []
        try:
            while tasks or not self._stop:
                while self._added and not self._stop:
                    tasks.append(asyncio.ensure_future(self._respond(session, *self._added.pop(0))))
                if self._stop:
                    await self.client.abort(session)
                await asyncio.sleep(_POLL)
                for task in [task for task in tasks if task.done()]:
                    task.result()
                    tasks.remove(task)
        finally:
            for task in tasks:  # an error of one may be the error of all
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _respond(self, session: aiohttp.ClientSession, prompt, responses, done) -> None:
        await asyncio.gather(*(self._continue(session, prompt, responses, j) for j in range(len(responses))))
        if all(response.finished for response in responses):
            await asyncio.to_thread(done)

    async def _continue(self, session: aiohttp.ClientSession, prompt, responses, j: int) -> None:
        begun = responses[j]
        if begun.finished:
            return
        async with self._slots:
            config = self.client.config
            left = config.max_response_tokens - len(begun.response_ids)
            body = {
                "input_ids": prompt + begun.response_ids,
                "sampling_params": self.client.sampling(config, left),
            } | (ROUTES if config.routing_replay else {})
            responses[j] = begun.continued(await self.client.request_one(session, body))
