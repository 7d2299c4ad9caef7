"""SGLang's deterministic inference: a response depends on its prompt and its seed, not on the rest of the batch."""

from dataclasses import replace

import httpx

from megatron_egrsd.config import ServersConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout.servers import RolloutServers

_ARGUMENT = "enable_deterministic_inference"


def deterministic(config: ServersConfig) -> ServersConfig:
    """Return `config` with the argument that makes launched servers use the seeds of requests."""
    return replace(config, args={_ARGUMENT: True} | config.args)


def check_deterministic(servers: RolloutServers) -> None:
    """Raise BadArgument if a server ignores the seeds of requests, RunError if it does not answer."""
    with httpx.Client(timeout=30.0, trust_env=False, headers=servers.headers) as http:
        for url in servers.urls:
            try:
                information = http.get(f"{url}/server_info").json()
            except (httpx.HTTPError, ValueError) as error:
                raise RunError(f"{url}/server_info does not answer ({error or type(error).__name__})") from None
            if not information.get(_ARGUMENT):
                raise BadArgument(
                    f"the server at {url} ignores seeds: start it with --{_ARGUMENT.replace('_', '-')}, or set "
                    "evaluation.benchmarks.deterministic false"
                )
