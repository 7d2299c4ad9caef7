"""The result of an optimizer step: sums over the response tokens that it trained, and whether it was applied."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state

from megatron_egrsd.data.packing import MicroBatch
from megatron_egrsd.engine.distributed import gather

# (log_prob [R], entropy [R], divergence [R] if a teacher is given, micro-batch) -> (loss to differentiate,
# TokenSums.values as detached scalars)
LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]

# A micro-batch's (loss, response tokens, sums), still on the device
Output = tuple[torch.Tensor | float, int, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TokenSums:
    """Sums over response tokens; those of micro-batches, ranks and updates add up with `+`."""

    loss: float = 0.0  # already divided by its normalizer
    tokens: float = 0.0  # the number of tokens
    values: dict[str, float] = field(default_factory=dict)  # by the name of the metric that is their mean

    def __add__(self, other: "TokenSums") -> "TokenSums":
        names = dict.fromkeys([*self.values, *other.values])
        values = {name: self.values.get(name, 0.0) + other.values.get(name, 0.0) for name in names}
        return TokenSums(self.loss + other.loss, self.tokens + other.tokens, values)


@dataclass(frozen=True)
class Update:
    """An optimizer step, equal on every rank. If it was skipped, the weights are as before."""

    sums: TokenSums
    skipped: str = ""  # the reason: "gradient", or as the caller of `Engine.train_step` calls it
    grad_norm: float = 0.0
    lr: float = 0.0
    micro_batches: int = 0


def differentiate(
    loss: LossFunction, output: torch.Tensor, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, Output]:
    """Return the loss of a micro-batch, its number of tokens for megatron-core, and the values to sum later."""
    tokens = batch.targets.numel()
    if not batch.members:  # padding alone: no loss, but this rank's backward pass must run in step with the others
        return output.sum(), torch.tensor(0, dtype=torch.int), (0.0, 0, {})
    value, sums = loss(*output, batch)
    return value, torch.tensor(tokens, dtype=torch.int), (value.detach(), tokens, sums)


def sum_over_ranks(outputs: list[Output]) -> TokenSums:
    """Sum over micro-batches and data-parallel ranks; the same result on every rank."""
    own = TokenSums()
    if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0:
        for loss, tokens, values in outputs:
            own += TokenSums(float(loss), float(tokens), {name: float(value) for name, value in values.items()})
    return sum(gather(own), TokenSums())
