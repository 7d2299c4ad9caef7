"""An HTTP server between client and SGLang that spoils some answers."""

import asyncio
import json
import random
import threading
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

FAULTS = ("drop", "cut", "delay", "error", "no json", "other json", "abort", "other tokens", "nan")


class FaultyProxy:
    """A proxy for `url`; a share of the requests for `path` meets one of `faults`. `counts` counts each fault.

    drop: the connection ends without an answer; cut: in the middle of it; delay: the answer comes after `patience`;
    error: HTTP 500; abort: SGLang gave up; nan: log-probs are null, as its JSON writes what is not finite.
    """

    def __init__(self, url: str, chance: random.Random, share: float, faults=FAULTS, patience: float = 1.0,
                 path: str = "/generate"):  # fmt: skip
        self.target, self.chance, self.share, self.faults, self.patience = url, chance, share, faults, patience
        self.path = path
        self.counts = dict.fromkeys(faults, 0)
        self.requests = 0

    def __enter__(self) -> "FaultyProxy":
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as self._session:
            started.set()
            await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        target = self.target + urlsplit(str(request.url)).path
        async with self._session.request(request.method, target, data=body, headers=_json(request)) as answer:
            content, status, content_type = await answer.read(), answer.status, answer.content_type
        fault = ""
        if request.path == self.path:
            self.requests += 1
            if self.chance.random() < self.share:
                fault = self.chance.choice(self.faults)
                self.counts[fault] += 1
        if fault in ("drop", "cut"):
            if fault == "cut":
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
                request.transport.write(head + content[: len(content) // 2])
            request.transport.close()
        elif fault == "delay":
            await asyncio.sleep(self.patience)
        elif fault == "error":
            content, status = b"out of luck", 500
        elif fault == "no json":
            content = content[: self.chance.randrange(len(content))]
        elif fault:
            content = json.dumps(self._spoiled(fault, json.loads(content))).encode()
        return web.Response(body=content, status=status, content_type=content_type)

    def _spoiled(self, fault: str, answer: dict):
        if fault == "other json":
            return self.chance.choice([None, 7, [], {}, "text", {"meta_info": []}, {"meta_info": {}}])
        meta = answer["meta_info"]
        if fault == "abort":
            meta["finish_reason"] = {"type": "abort", "message": "out of luck"}
        elif fault == "other tokens":
            answer["output_ids"] = [*answer["output_ids"], 1]
        elif fault == "nan":
            meta["output_token_logprobs"] = [[None, *entry[1:]] for entry in meta["output_token_logprobs"]]
        return answer


def _json(request: web.Request) -> dict[str, str]:
    return {"Content-Type": request.headers.get("Content-Type", "application/json")}
