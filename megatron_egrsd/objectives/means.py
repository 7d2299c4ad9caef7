"""Sums over the tokens of a whole batch, for objectives whose loss is a mean over some of them."""

import torch
import torch.distributed as dist


def totals(*columns: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum of each column [T], numbers or masks, over the ranks of `group`: fp64, None: these are all."""
    sums = torch.stack([column.double().sum() for column in columns])
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    return sums
