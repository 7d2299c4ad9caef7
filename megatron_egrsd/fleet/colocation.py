"""Phases of a run in which engine or SGLang holds the GPU memory.

```
phase       the engine holds                        SGLang holds
sampling    nothing (its copies wait on the host)   weights, KV cache, CUDA graphs
transfer    weights                                 weights
training    weights, gradients, optimizer           nothing
```

This is so if both share the GPUs (`Colocated`); on GPUs of their own both hold everything in all phases (`Separate`).
"""

from collections.abc import Callable
from functools import cached_property
from typing import Literal, Protocol

from megatron_egrsd.engine.distributed import gather, on_first_rank
from megatron_egrsd.fleet.fleet import Fleet
from megatron_egrsd.rollout.control import Control
from megatron_egrsd.rollout.server_memory import CACHES, EVERYTHING, WEIGHTS, ServerMemory
from megatron_egrsd.rollout.servers import retry_lost

Phase = Literal["sampling", "transfer", "training"]
Entry = Literal[Phase, "recovery", "end"]


class Placement(Protocol):
    """The GPUs of engine and SGLang, phase by phase. Every rank makes the same calls; rank 0 speaks to the servers.

    Attributes:
        phase: In "training" the servers hold no weights: push them before sampling.
    """

    phase: Phase

    def enter(self, phase: Entry) -> None:
        """Hand over the memory that `phase` needs; return when it may begin.

        "recovery" awaits servers that start again, with the memory that they expect to be free; the phase is
        "sampling" then. "end" ends the servers for good, if the engine needs their memory.

        Raises ServersLost on the way to "transfer" or "sampling": enter "recovery", and try again.
        """


class Separate:
    """Engine and SGLang on GPUs of their own: every phase may begin at once. `fleet` is None without SGLang."""

    def __init__(self, fleet: Fleet | None):
        self.fleet = fleet
        self.phase: Phase = "sampling"

    def enter(self, phase: Entry) -> None:
        if phase == "transfer":
            self.fleet.recover()


class Colocated:
    """Engine and SGLang on the same GPUs. Made before the fleet starts, so that its servers find the memory free."""

    def __init__(self, fleet: Fleet):
        self.fleet, self.engine = fleet, fleet.engine
        self.phase: Phase = "sampling"
        self._offload()
        self._enter: dict[Entry, Callable[[], None]] = {
            "sampling": self._enter_sampling,
            "transfer": self._enter_transfer,
            "training": self._enter_training,
            "recovery": self._recover,
            "end": self._end,
        }

    def enter(self, phase: Entry) -> None:
        self._enter[phase]()

    @cached_property
    def memory(self) -> ServerMemory:
        """The memory of the servers, on rank 0, once they have started."""
        return ServerMemory(Control(self.fleet.servers, self.fleet.config.sync.timeout))

    def _offload(self, *, keep_weights: bool = False) -> None:
        """Offload the engine; return when every rank has, because rank 0 then lets servers map that memory."""
        self.engine.offload(keep_weights=keep_weights)
        gather(None)

    def _enter_sampling(self) -> None:
        """Go from "transfer" to "sampling", when SGLang has the weights."""
        self._offload()
        on_first_rank(lambda: self.memory.resume(*CACHES))
        self.phase = "sampling"

    def _enter_transfer(self) -> None:
        if self.phase == "training":
            self._offload(keep_weights=True)
        else:
            self.fleet.recover()
            on_first_rank(lambda: self.memory.release(*CACHES))
            self.engine.reload(only_weights=True)
        on_first_rank(lambda: self.memory.resume(WEIGHTS))
        self.phase = "transfer"

    def _enter_training(self) -> None:
        if self.phase != "training":
            # Servers that start again would take the memory: await them, then release it.
            self.fleet.recover()
            retry_lost(lambda: on_first_rank(lambda: self.memory.release(*EVERYTHING)), lambda _: self._recover())
            self.engine.reload()
            self.phase = "training"

    def _recover(self) -> None:
        self._offload()
        self.phase = "sampling"
        self.fleet.recover()

    def _end(self) -> None:
        self.fleet.nodes.each(self.fleet.close)  # no rank reloads while servers of another one hold the memory
        self.engine.reload()
        self.phase = "training"
