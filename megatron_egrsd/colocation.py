"""Engine and SGLang on the same GPUs, in turns: what one needs, the other has handed back.

```
turn        the engine holds                       SGLang holds
sampling    nothing (its copies wait on the host)  weights, KV cache, CUDA graphs
transfer    weights                                weights
training    weights, gradients, optimizer          nothing
```
"""

from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.rollout.server_memory import CACHES, EVERYTHING, WEIGHTS, ServerMemory
from megatron_egrsd.rollout.servers import ServersLost


class Colocation:
    """Whose turn it is. Every rank makes the same calls; the first one speaks to the servers.

    It begins with sampling: make it before the servers start, so that they find the memory free.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.memory: ServerMemory | None = None  # the servers', on the first rank, once they have started
        self.turn = "sampling"
        engine.offload()

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
            on_first_rank(lambda: self.memory.servers.recover())
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
        on_first_rank(lambda: self.memory.servers.recover())

    def end(self) -> None:
        """End the servers for good: all memory is the engine's."""
        on_first_rank(lambda: self.memory.servers.close())
        self.engine.reload()
        self.turn = "training"


class Apart:
    """Engine and SGLang on GPUs of their own, both always in turn."""

    turn = "sampling"

    def _carry_on(self) -> None:
        pass

    sampling = transfer = training = give_way = end = _carry_on
