"""GPU memory of servers that share their GPUs with the training ranks, released and resumed in parts."""

from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.servers import ServersLost

WEIGHTS = "weights"
CACHES = "kv_cache", "cuda_graph"
EVERYTHING = (WEIGHTS, *CACHES)


class ServerMemory:
    """Which parts every server holds; a part is released, or resumed, where that has not been done.

    SGLang does it by unmapping GPU memory (its enable_memory_saver, which colocated servers are launched with) and
    forgets what was in it: released weights must be pushed again. On CPU it goes through the same motions and keeps
    both memory and weights. Only for idle servers; generation that needs a released part would crash them.
    """

    def __init__(self, control: Control):
        self.control, self.servers = control, control.servers

    def release(self, *parts: str) -> None:
        """Free `parts` on every server. ServersLost where one does not: all are started anew then."""
        self._move("release_memory_occupation", parts, lambda server, part: part not in server.released)
        for server in self.servers.servers:
            server.released |= set(parts)

    def resume(self, *parts: str) -> None:
        """Allocate `parts` again on every server. ServersLost where one does not: all are started anew then."""
        self._move("resume_memory_occupation", parts, lambda server, part: part in server.released)
        for server in self.servers.servers:
            server.released -= set(parts)

    def _move(self, endpoint: str, parts: tuple[str, ...], is_due) -> None:
        self.control.start_clock()
        due = [[part for part in parts if is_due(server, part)] for server in self.servers.servers]
        try:
            self.control.await_idle()
            self.control.on_all(endpoint, [{"tags": tags} if tags else None for tags in due])
        except ServersLost as lost:
            self.servers.mark_all_lost(str(lost))
            raise
