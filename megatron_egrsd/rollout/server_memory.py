"""GPU memory of servers that share their GPUs with the training ranks, released and resumed in parts."""

from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.servers import ServersLost

WEIGHTS = "weights"
CACHES = "kv_cache", "cuda_graph"
EVERYTHING = (WEIGHTS, *CACHES)


class ServerMemory:
    """Parts of the servers' GPU memory, released and resumed; requests only the parts that still need it.

    SGLang unmaps GPU memory (its enable_memory_saver, an argument of colocated servers) and loses its content: released
    weights must be pushed again. On CPU it accepts the requests and keeps both memory and weights. Only for idle
    servers: generation that needs a released part would crash them.
    """

    def __init__(self, control: Control):
        self.control, self.servers = control, control.servers

    def release(self, *parts: str) -> None:
        """Free `parts` on every server. Raises ServersLost if a server fails to, after restarting all servers."""
        self._request_due("release_memory_occupation", parts, lambda server, part: part not in server.released)
        for server in self.servers.servers:
            server.released |= set(parts)

    def resume(self, *parts: str) -> None:
        """Allocate `parts` again on every server. Raises ServersLost if one fails to, after restarting all servers."""
        self._request_due("resume_memory_occupation", parts, lambda server, part: part in server.released)
        for server in self.servers.servers:
            server.released -= set(parts)

    def _request_due(self, endpoint: str, parts: tuple[str, ...], is_due) -> None:
        self.control.start_clock()
        due = [[part for part in parts if is_due(server, part)] for server in self.servers.servers]
        try:
            self.control.await_idle()
            self.control.on_all(endpoint, [{"tags": tags} if tags else None for tags in due])
        except ServersLost as lost:
            self.servers.mark_all_lost(str(lost))
            raise
