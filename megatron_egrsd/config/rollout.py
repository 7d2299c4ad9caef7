"""Sampling, the SGLang servers that do it, and the weights that are sent to them."""

import urllib.parse
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_egrsd.config.check import require, require_not_negative, require_positive, require_truncation


@dataclass(frozen=True)
class ServersConfig:
    """The SGLang servers, launched by the run or by the user.

    Args:
        urls: Servers that already run, or a router (sglang-router) for those behind it; empty launches `engines`
            servers on every node.
        engines: Servers to launch on each node.
        tensor_parallel: Tensor-parallel size of each launched server.
        colocated: The launched servers run on the GPUs of the training ranks, and the two take turns: what one needs
            the other has moved to host memory, or freed, meanwhile. With sync.transport ipc or disk
            (docs/guides/cluster.md).
        host: Address the launched servers listen on; on other nodes than the first one, theirs towards it.
        port: First port of the launched servers; 0 picks free ones.
        cpu_threads: Threads of a launched server on CPU, whatever OMP_NUM_THREADS gives the training ranks. More than
            there are idle cores make it many times slower.
        max_concurrent_requests: Requests in flight for each server; what its memory does not hold waits there.
        max_total_tokens: Size of a launched server's KV cache in tokens; 0 leaves it to SGLang.
        args: Further SGLang launch arguments, without the leading dashes, with - or _; true means a bare flag.
        api_key_variable: Environment variable that holds the servers' API key, which is never written anywhere. ""
            makes a new key for launched servers.
        start_timeout: Seconds until a launched server must be healthy.
        health_timeout: A server that has not been healthy for so many seconds while it generates counts as hung.
        request_timeout: Seconds a generation request may take; less than parallel.timeout.
        request_retries: Further attempts after a request that failed on a healthy server.
        max_restarts: Server restarts allowed per run. A failed weight sync that takes down several servers counts as
            one.
    """

    urls: list[str] = field(default_factory=list)
    engines: int = 1
    tensor_parallel: int = 1
    colocated: bool = False
    host: str = "127.0.0.1"
    port: int = 0
    cpu_threads: int = 1
    max_concurrent_requests: int = 512
    max_total_tokens: int = 0
    args: dict[str, Any] = field(default_factory=dict)
    api_key_variable: str = ""
    start_timeout: float = 600.0
    health_timeout: float = 120.0
    request_timeout: float = 3600.0
    request_retries: int = 3
    max_restarts: int = 10

    def __post_init__(self):
        args = {name.replace("-", "_"): value for name, value in self.args.items()}
        require(
            len(args) == len(self.args),
            f"rollout.servers.args names one argument twice, with - and with _: {', '.join(self.args)}; leave one out",
        )
        object.__setattr__(self, "args", args)
        counts = ("engines", "tensor_parallel", "cpu_threads", "max_concurrent_requests")
        require_positive(self, "rollout.servers", *counts, "start_timeout", "health_timeout", "request_timeout")
        require_not_negative(self, "rollout.servers", "max_restarts", "request_retries", "max_total_tokens")
        gpu, share = args.get("base_gpu_id", 0), args.get("mem_fraction_static", 0.5)
        require(
            type(gpu) is int and gpu >= 0,
            f"rollout.servers.args.base_gpu_id is {gpu!r}; it must be the number of a GPU, from 0",
        )
        require(
            isinstance(share, float) and 0 < share < 1,
            f"rollout.servers.args.mem_fraction_static is {share!r}; it must be a number between 0 and 1",
        )
        require(
            not (self.colocated and self.urls),
            "rollout.servers.colocated shares GPUs with servers that the run launches; empty rollout.servers.urls",
        )
        for url in self.urls:
            parts = urllib.parse.urlsplit(url)
            guess = f"http://{url.partition('://')[2] or url}"
            require(
                parts.scheme in ("http", "https") and bool(parts.hostname),
                f"rollout.servers.urls has {url!r}, which is no address; write {guess}",
            )
        require(0 <= self.port < 65536, f"rollout.servers.port is {self.port}; it must lie in [0, 65535]")


@dataclass(frozen=True)
class SyncConfig:
    """The synchronisation of weights with the servers.

    Args:
        transport: Over a process group from rank 0; by handles to memory of a node's first rank, which the servers of
            the same node open (CUDA IPC, shared memory on CPU); or through a directory on disk.
        bucket_mib: Size of one broadcast bucket.
        verify: Compare every weight in SGLang with the engine's after each synchronisation, bit by bit.
        timeout: Seconds one weight synchronisation may take.
        lora: The content of a synchronisation if adapters are trained: weights with the adapters merged into them,
            after the first sync only those that have one; or the adapters themselves, which SGLang adds to every
            product. The latter needs servers that the run launches and transport ipc or disk (docs/guides/lora.md).
    """

    transport: Literal["distributed", "ipc", "disk"] = "distributed"
    bucket_mib: int = 512
    verify: bool = False
    timeout: float = 600.0
    lora: Literal["merged", "adapter"] = "merged"

    def __post_init__(self):
        require_positive(self, "rollout.sync", "bucket_mib", "timeout")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling.

    Args:
        prompts_per_step: Prompts in one batch.
        rollouts_per_prompt: Responses sampled for each prompt; the group advantage compares them and needs at least 2.
        temperature: Sampling temperature, and that of scoring unless objective.score_temperature is set.
        top_p: Sample from the smallest set of tokens of this probability.
        top_k: Sample from the k most likely tokens; 0 from all.
        max_response_tokens: A response is cut here and then counts as unfinished (L_max of the length bonus).
        stop_tokens: Tokens that end a response, besides the tokenizer's end of text and the one that the chat template
            ends a turn of the assistant with.
        dynamic_sampling: Rounds in which groups without a signal (all right or all wrong) are replaced by fresh
            prompts before a batch is trained; 0 trains the batch as it came.
        staleness: Updates that may lie between the weights that sample a token and those that it trains. 0 is exactly
            on-policy; 1 samples the next batch while this one trains (docs/guides/overlap.md); more needs
            `partial`.
        partial: Partial rollouts: new weights do not wait for the responses in flight, which go on with them.
        routing_replay: Of a mixture of experts, send every token through the experts that SGLang chose for it, in the
            student's scores and in training, so that both sides agree although they compute in another order. The
            teacher chooses its own.
        extra_prompts: Prompts in flight beyond one batch: as many may be carried over while others are trained. At most
            `prompts_per_step`, and only if `partial` is set and `staleness` is 2 or more.
        servers: The SGLang servers.
        sync: The synchronisation of weights with them.
    """

    prompts_per_step: int = 32
    rollouts_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_tokens: int = 8192
    stop_tokens: list[str] = field(default_factory=list)
    dynamic_sampling: int = 0
    staleness: int = 0
    partial: bool = False
    routing_replay: bool = False
    extra_prompts: int = 0
    servers: ServersConfig = field(default_factory=ServersConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)

    def __post_init__(self):
        require_positive(self, "rollout", "prompts_per_step", "rollouts_per_prompt", "max_response_tokens")
        require_not_negative(self, "rollout", "dynamic_sampling")
        require_truncation(self, "rollout")
        require(self.temperature > 0, "rollout.temperature must be positive: on-policy sampling needs T > 0")
        require(
            self.staleness in (0, 1) or (self.partial and self.staleness > 1),
            f"rollout.staleness is {self.staleness}; it must be 0 (on-policy) or 1 (the next batch is sampled while "
            "this one trains), or more with rollout.partial",
        )
        require(
            not self.partial or self.staleness > 0,
            "rollout.partial continues responses with newer weights, but rollout.staleness is 0 and allows no older "
            "ones; set rollout.staleness to 1 or more",
        )
        require(
            not (self.partial and self.dynamic_sampling),
            "rollout.partial and rollout.dynamic_sampling do not go together; set one of them",
        )
        require(
            not (self.partial and any("speculative" in name for name in self.servers.args)),
            "rollout.partial stops a response before SGLang has looked for its end among the tokens of its last step; "
            "with speculative decoding those are many, so take it out of rollout.servers.args",
        )
        most = self.prompts_per_step if self.partial and self.staleness > 1 else 0
        require(
            0 <= self.extra_prompts <= most,
            f"rollout.extra_prompts is {self.extra_prompts}; it must lie between 0 and rollout.prompts_per_step, and "
            "be 0 without rollout.partial and a rollout.staleness of 2 or more, so that what is carried over fits into "
            "one batch before it is too old",
        )
        if self.servers.colocated:
            require(
                self.sync.transport != "distributed",
                'rollout.servers.colocated needs rollout.sync.transport "ipc" or "disk": NCCL takes no two processes '
                "on one GPU",
            )
            require(
                not self.staleness,
                "rollout.servers.colocated takes turns on one set of GPUs, rollout.staleness samples while they train; "
                "choose one of the two",
            )

    @property
    def rollouts_per_step(self) -> int:
        """Responses in one batch."""
        return self.prompts_per_step * self.rollouts_per_prompt
