"""Engine and SGLang on the same GPUs, in turns: what one needs, the other has handed back.

```
turn        the engine holds                       SGLang holds
sampling    nothing (its copies wait on the host)  weights, KV cache, CUDA graphs
transfer    weights                                weights
training    weights, gradients, optimizer          nothing
```
"""

from functools import cached_property

from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.fleet.fleet import Fleet
from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.server_memory import CACHES, EVERYTHING, WEIGHTS, ServerMemory
from megatron_egrsd.rollout.servers import ServersLost


class Colocation:
    """Whose turn it is. Every rank makes the same calls; the first one speaks to the servers.

    It begins with sampling: make it before the fleet starts, so that the servers find the memory free.
    """

    def __init__(self, fleet: Fleet):
        self.fleet, self.engine = fleet, fleet.engine
        self.turn = "sampling"
        self.engine.offload()

    @cached_property
    def memory(self) -> ServerMemory:
        """The servers', on the first rank, once they have started."""
        return ServerMemory(Control(self.fleet.servers, self.fleet.config.rollout.sync_timeout))

    def sampling(self) -> None:
        """SGLang may sample. From `transfer`, when it has the weights."""
        self.engine.offload()
        on_first_rank(lambda: self.memory.resume(*CACHES))
        self.turn = "sampling"

    def transfer(self) -> None:
        """Both hold weights and nothing else. ServersLost: `give_way`, and once more."""
        if self.turn == "training":
            self.engine.offload(keep_weights=True)
        else:
            self.fleet.recover()
            on_first_rank(lambda: self.memory.release(*CACHES))
            self.engine.reload(only_weights=True)
        on_first_rank(lambda: self.memory.resume(WEIGHTS))
        self.turn = "transfer"

    def training(self) -> None:
        """The engine may train. SGLang forgets its weights: they are pushed before it samples again."""
        while self.turn != "training":
            try:
                on_first_rank(lambda: self.memory.release(*EVERYTHING))
            except ServersLost:
                self.give_way()  # those that start anew would take the memory
                continue
            self.engine.reload()
            self.turn = "training"

    def give_way(self) -> None:
        """Await the servers that are starting anew, with the memory that they expect to be free."""
        self.engine.offload()
        self.turn = "sampling"
        self.fleet.recover()

    def end(self) -> None:
        """End the servers for good: all memory is the engine's."""
        self.fleet.close()
        self.engine.reload()
        self.turn = "training"


class Apart:
    """Engine and SGLang on GPUs of their own, both always in turn; `fleet` is None where there is no SGLang."""

    turn = "sampling"

    def __init__(self, fleet: Fleet | None):
        self.fleet = fleet

    def transfer(self) -> None:
        self.fleet.recover()

    def _carry_on(self) -> None:
        pass

    sampling = training = give_way = end = _carry_on
