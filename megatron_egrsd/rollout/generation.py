"""SGLang's answer to a generation request: a response or a partial response."""

import base64
import contextlib
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_egrsd.errors import RunError
from megatron_egrsd.system.worker_process import WorkerProcess

NO_ROUTE = 255  # in place of an expert: the router chooses
LARGE = 1 << 16  # bytes of an answer (2,000 tokens) above which parsing in another process saves time


@dataclass(frozen=True)
class Generation:
    """One sampled response or partial response.

    `log_probs[t]` is the log-probability (nats) of `response_ids[t]` under softmax(logits / temperature). A response
    that stopped ends with the stop token. `finish_reason` is "stop", "length" or, for a partial response, "abort".
    `segments` lists [weight version, number of tokens sampled by it], in order. A version is the number of the last
    weight sync: 0 before the first, -1 if the server reports a version that is no number. `routes` are the experts of
    prompt and response but its last token, uint8 [tokens - 1, layers, k] as bytes, if they were asked for.
    """

    response_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    segments: list[list[int]]
    routes: bytes = b""

    @property
    def weight_version(self) -> int:
        """The weight version of the first token, which is the oldest."""
        return self.segments[0][0]

    @property
    def finished(self) -> bool:
        return self.finish_reason != "abort"

    def continued(self, more: "Generation") -> "Generation":
        """Return this partial response followed by the tokens of `more`.

        `more` computes the earlier tokens again; they keep the routes with which they were sampled.
        """
        by_version = itertools.groupby(self.segments + more.segments, key=lambda segment: segment[0])
        segments = [[version, sum(tokens for _, tokens in same)] for version, same in by_version]
        ids, log_probs = self.response_ids + more.response_ids, self.log_probs + more.log_probs
        routes = self.routes + more.routes[len(self.routes) :]
        return Generation(ids, log_probs, more.finish_reason, segments, routes)


NOTHING = Generation([], [], "abort", [])


def read_answer(answer: bytes | memoryview, stopping: bool = False) -> Generation:
    """Parse SGLang's JSON by `parse_generation`."""
    return parse_generation(orjson.loads(answer), stopping)


def read_apart(answer: bytes, stopping: bool = False) -> Generation:
    """Run `read_answer` in another process and wait for it. Any thread may call.

    A million tokens take most of a second of Python (benchmarks/host.py): a step that trains meanwhile in this
    process would wait for Python's lock.
    """
    reply = None
    with contextlib.suppress(RunError):  # it does not start
        reply = _reader.ask(bytes([stopping]) + answer)
    if reply is None:  # this process can read it as well
        return read_answer(answer, stopping)
    outcome = pickle.loads(reply)
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def parse_generation(answer: Any, stopping: bool = False) -> Generation:
    """Return SGLang's answer as a Generation. Raises ValueError if it was aborted, is inconsistent or not SGLang's.

    With `stopping`, an aborted answer is a partial response, possibly without tokens. SGLang does not check whether its
    last token ends the response, so the last token is dropped and sampled again. A log-probability that SGLang could
    not compute (null in JSON) becomes nan; the update that contains it is skipped.
    """
    try:
        meta = answer["meta_info"]
        reason, version = meta["finish_reason"], meta["weight_version"]
        kind = (reason or {}).get("type")
        message = (reason or {}).get("message", "no reason given")
        values = [entry[0] for entry in meta["output_token_logprobs"]]
        sampled_ids = [entry[1] for entry in meta["output_token_logprobs"]]
        output_ids = list(answer["output_ids"])
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"not an answer of SGLang's ({type(error).__name__}: {error})") from None
    begun = stopping and kind == "abort"
    if kind not in ("stop", "length") and not begun:
        raise ValueError(f"SGLang aborted the generation: {message}")
    if sampled_ids != output_ids:
        raise ValueError(f"log-probabilities of other tokens than it sampled; {len(output_ids)} tokens, "
                         f"{len(values)} log-probabilities")  # fmt: skip
    if not (sampled_ids or begun) or set(map(type, sampled_ids)) - {int} or min(sampled_ids, default=0) < 0:
        raise ValueError("no tokens, or something that is no token id")
    if set(map(type, values)) - {float, int, type(None)}:
        raise ValueError("a log-probability that is no number")
    try:
        log_probs = [math.nan if value is None else float(value) for value in values]
    except OverflowError:
        raise ValueError("a log-probability that no float holds") from None
    version = int(version) if isinstance(version, str) and version.isdecimal() else -1
    routes = _read_routes(meta, len(output_ids), dropped=int(begun))
    if begun:
        sampled_ids, log_probs = sampled_ids[:-1], log_probs[:-1]
    return Generation(sampled_ids, log_probs, kind, [[version, len(sampled_ids)]] if sampled_ids else [], routes)


def _read_routes(meta: dict, sampled: int, dropped: int) -> bytes:
    """Return the experts in SGLang's `meta` for all tokens but the last `dropped` + 1; b"" if it sends none.

    Raises ValueError if they are not one byte each (there are at most 255 experts), or those of other tokens.
    """
    encoded = meta.get("routed_experts")
    if not encoded or sampled <= dropped:
        return b""
    try:
        experts = np.frombuffer(base64.b64decode(encoded, validate=True), np.int32)
        tokens = meta["prompt_tokens"] + sampled - 1
        rows = experts.reshape(tokens, -1)
    except (ValueError, TypeError, KeyError):
        raise ValueError("routed experts of other tokens than it read and sampled") from None
    if not rows.size or rows.min() < 0 or rows.max() >= NO_ROUTE:
        raise ValueError(f"a routed expert outside [0, {NO_ROUTE - 1}]")
    return rows[: tokens - dropped].astype(np.uint8).tobytes()


_reader = WorkerProcess(f"{__name__}:reading", "orjson")


def reading() -> Callable[[bytes], bytes]:
    """Return the reader's function: `stopping` as a byte and the answer in, pickled Generation or ValueError out."""

    def read(request: bytes) -> bytes:
        try:
            outcome: Generation | ValueError = read_answer(memoryview(request)[1:], stopping=bool(request[0]))
        except ValueError as error:
            outcome = ValueError(str(error))  # orjson's own cannot be unpickled
        return pickle.dumps(outcome)

    return read
