"""Row statistics of several parts of the vocabulary (shards, chunks) become those of the whole, and then the results."""

import torch
import torch.distributed as dist

from megatron_egrsd.vocab_parallel.reference import LN2
from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX, Shard


def combine(parts_RN4: torch.Tensor) -> torch.Tensor:
    """[R, N, 4] statistics of R disjoint column ranges -> [N, 4] of their union.

    References are integers in powers of two, so bringing a part to the common one scales its sums exactly.
    """
    reference_RN, total_RN, weighted_RN, target_RN = parts_RN4.unbind(-1)
    common_N = reference_RN.amax(0)
    # a part without a finite logit has reference -inf and sums of 0: any finite shift will do
    shift_RN = torch.where(reference_RN == -torch.inf, -torch.inf, reference_RN - common_N)
    scale_RN = shift_RN.exp2()
    nats_RN = shift_RN.clamp_min(-1e4) * LN2
    return torch.stack(
        [
            common_N,
            (scale_RN * total_RN).sum(0),
            (scale_RN * (weighted_RN + nats_RN * total_RN)).sum(0),
            (target_RN + shift_RN * LN2).amax(0),
        ],
        dim=-1,
    )


def combine_ranks(part_N4: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Statistics of the whole vocabulary from those of every rank's shard: one all-gather of four floats a token."""
    if shard.ranks == 1:
        return part_N4
    parts_RN4 = part_N4.new_empty((shard.ranks, *part_N4.shape))
    dist.all_gather_into_tensor(parts_RN4.view(-1, 4), part_N4.contiguous(), group=shard.group)
    return combine(parts_RN4)


def log_prob_and_entropy_of(statistics_N4: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(target) [N], entropy [N]) in nats, fp32; zeros where the target is IGNORE_INDEX.

    The entropy is at least 0: near-deterministic rows may round to -1e-7. A NaN stays a NaN.
    """
    _, total_N, weighted_N, relative_target_N = statistics_N4.unbind(-1)
    log_total_N = total_N.log()
    ignored_N = target_N == IGNORE_INDEX
    log_prob_N = (relative_target_N - log_total_N).masked_fill(ignored_N, 0.0)
    entropy_N = (log_total_N - weighted_N / total_N).clamp_min(0.0).masked_fill(ignored_N, 0.0)
    return log_prob_N, entropy_N
