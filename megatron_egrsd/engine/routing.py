"""Rollout routing replay: a token goes to the experts that SGLang chose for it, in scoring and in training.

megatron-core's router asks an object of its own for the choice (`router_replay`); this is one that knows several
micro-batches in flight and what a checkpointed layer computes again.
"""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import TopKRouter

from megatron_egrsd.rollout.generation import NO_ROUTE


class ReplayedRouting:
    """The routers of this rank's `model`; without routes each chooses as ever."""

    def __init__(self, model: list[DistributedDataParallel], sequence_parallel: bool):
        self.sequence_parallel = sequence_parallel
        self.choices = {id(chunk): _attach(chunk) for chunk in model}

    def begin(self, chunk: torch.nn.Module, routes: torch.Tensor | None) -> None:
        """Send the tokens of the next forward pass of `chunk` to `routes` [T, layers, k]; call it before each pass.

        T are the tokens of this context-parallel rank. Under sequence parallelism a router sees its own part of them.
        """
        if routes is not None and self.sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            routes = routes.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        for choice in self.choices[id(chunk)]:
            choice.begin(None if routes is None else routes[:, choice.layer])

    def share_changed(self, device: torch.device) -> float:
        """Return the share of (token, layer) since the last call whose router would have chosen other experts.

        Over all ranks, each of which must call; 0 if nothing was replayed.
        """
        total = torch.zeros(2, device=device)
        for choice in (choice for chunk in self.choices.values() for choice in chunk):
            total += choice.counts.to(device)
            choice.counts = torch.zeros(2)
        dist.all_reduce(total)
        changed, replayed = total.tolist()
        return changed / max(replayed, 1.0)


class _Choice:
    """The choice of experts in one layer: the replayed one, or the router's own."""

    def __init__(self, layer: int):
        self.layer = layer
        self.counts = torch.zeros(2)  # choices that the router would have made otherwise, and replayed ones
        self._routes: torch.Tensor | None = None  # [T, k] of the next forward pass
        self._again: deque[torch.Tensor | None] = deque()  # of those that a backward pass will compute again
        self._training = False

    def begin(self, routes: torch.Tensor | None) -> None:
        self._routes, self._training = routes, torch.is_grad_enabled()

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """Return values [T, k] of `scores` [T, experts] and their experts; megatron-core's RouterReplay names this."""
        own_values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        routes = self._take()
        if routes is None:
            return own_values, own
        has_route = routes[:, :1] != NO_ROUTE
        chosen = torch.where(has_route, routes.long(), own)
        changed = (chosen.sort(1).values != own.sort(1).values).any(1)
        self.counts = self.counts.to(scores.device) + torch.stack([changed.sum(), has_route.sum()])
        return scores.gather(1, chosen), chosen

    def _take(self) -> torch.Tensor | None:
        """Return the routes of this call. The passes of a layer are computed again in the order of the first ones."""
        if torch.is_grad_enabled() and self._again:  # a layer is checkpointed always or never
            return self._again.popleft()
        if self._training and not torch.is_grad_enabled():
            self._again.append(self._routes)
        return self._routes


def _attach(chunk: torch.nn.Module) -> list[_Choice]:
    routers = _routers(chunk)
    for router in routers:
        router.router_replay = _Choice(router.layer_number - 1)
    return [router.router_replay for router in routers]


def freeze_routers(model: Sequence[torch.nn.Module]) -> None:
    """Keep the weights of all routers from being trained."""
    for chunk in model:
        for router in _routers(chunk):
            router.requires_grad_(False)


def _routers(chunk: torch.nn.Module) -> list[TopKRouter]:
    return [module for module in chunk.modules() if isinstance(module, TopKRouter)]
