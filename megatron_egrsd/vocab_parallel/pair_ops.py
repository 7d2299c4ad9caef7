"""The kernels of two tensors of logits, the teacher's and the student's: compiled if built, else plain torch.

`statistics` reads both tensors once; `combine` merges the parts of the vocabulary; `entry_sums` reads both again for
what needs the normalised probabilities; `gradient` reads both and writes one. The method is in
`csrc/common/divergence.h`.
"""

import math
from typing import NamedTuple

import torch

from megatron_egrsd.vocab_parallel import kernels, pair_reference
from megatron_egrsd.vocab_parallel.ops import compiled
from megatron_egrsd.vocab_parallel.rows import row_views, spans
from megatron_egrsd.vocab_parallel.shard import Shard

KINDS = {"forward_kl": pair_reference.FORWARD_KL, "reverse_kl": pair_reference.REVERSE_KL, "jsd": pair_reference.JSD}


class Form(NamedTuple):
    """The form of a divergence: its kind, the limit of an entry (inf: none), and JSD's beta."""

    kind: str
    limit: float = math.inf
    beta: float = 0.5

    @property
    def second_reading(self) -> bool:
        """Return whether the value needs the normalised probabilities, and so a second reading of both tensors."""
        return self.kind == "jsd" or self.limit < math.inf

    @property
    def student_first(self) -> bool:
        """Return whether the first reading takes KL(student || teacher)."""
        return self.kind == "reverse_kl" and not self.second_reading

    @property
    def arguments(self) -> tuple[int, float, float]:
        return KINDS[self.kind], self.limit, self.beta


def statistics(
    first: torch.Tensor, second: torch.Tensor, shard: Shard, temperature: float, other_entropy: bool
) -> torch.Tensor:
    """Return the PairStatistics [N, 8] fp32 of this shard; `other_entropy`: the second tensor's is wanted too."""
    if compiled(first.device):
        pair = _pair(first, second, shard, temperature)
        return kernels.sum_rows(first, "pair_statistics", pair, other_entropy, valid=shard.valid, floats=8)
    views = _row_views(first, second)
    return torch.cat([pair_reference.statistics(a, b, shard.valid, 1.0 / temperature) for a, b in views])


def merge(parts_RN8: torch.Tensor, temperature: float) -> torch.Tensor:
    """Merge the PairStatistics of R disjoint parts of the vocabulary: [N, 8] fp32."""
    if not compiled(parts_RN8.device):
        return pair_reference.merge(parts_RN8, 1.0 / temperature).float()
    parts_RN8 = parts_RN8.contiguous()
    ranks, rows, _ = parts_RN8.shape
    out_N8 = parts_RN8.new_empty((rows, 8))
    kernels.call(parts_RN8, "merge_pairs", parts_RN8.data_ptr(), ranks, rows, 1.0 / temperature, out_N8.data_ptr())
    return out_N8


def combine(
    parts_RN8: torch.Tensor, temperature: float, student_first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge PairStatistics [R, N, 8] of R disjoint parts.

    Returns the PairScale [N, 5], KL(first || second) [N] and the teacher's entropy [N]; fp32, nats.
    """
    if not compiled(parts_RN8.device):
        return pair_reference.combine(parts_RN8, 1.0 / temperature, student_first)
    parts_RN8 = parts_RN8.contiguous()
    ranks, rows, _ = parts_RN8.shape
    results = [parts_RN8.new_empty(shape) for shape in ((rows, 5), (rows,), (rows,))]
    addresses = [x.data_ptr() for x in results]
    kernels.call(
        parts_RN8, "combine_pairs", parts_RN8.data_ptr(), ranks, rows, 1.0 / temperature, student_first, *addresses
    )  # fmt: skip
    return results[0], results[1], results[2]


def entry_sums(
    teacher: torch.Tensor, student: torch.Tensor, scale_N5: torch.Tensor, form: Form, shard: Shard, temperature: float
) -> torch.Tensor:
    """Return the EntrySums [N, 3] fp32 of this shard."""
    if compiled(teacher.device):
        pair, entries = _pair(teacher, student, shard, temperature), _entries(scale_N5, teacher, form)
        return kernels.sum_rows(teacher, "entry_sums", pair, entries, valid=shard.valid, floats=3)
    parts, views = [], _row_views(teacher, student)
    for (a, b), span in zip(views, spans(a for a, _ in views), strict=True):
        parts.append(pair_reference.entry_sums(a, b, scale_N5[span], *form.arguments, shard.valid, 1.0 / temperature))
    return torch.cat(parts)


def gradient(
    teacher: torch.Tensor,
    student: torch.Tensor,
    scale_N5: torch.Tensor,
    sums_N3: torch.Tensor,
    grad_value_N: torch.Tensor,
    form: Form,
    shard: Shard,
    temperature: float,
    *,
    inplace: bool,
) -> torch.Tensor:
    """Return the gradient with respect to the student's logits; `inplace` writes it over them."""
    out = student if inplace else torch.empty_like(student, memory_format=torch.contiguous_format)
    if compiled(teacher.device):
        pair, entries = _pair(teacher, student, shard, temperature), _entries(scale_N5, teacher, form)
        rows, device = kernels.count_rows(teacher), teacher.device
        described = kernels.native.PairGradient(
            out.data_ptr(), kernels.layout_of(out, shard)[1:], kernels.address(sums_N3, "sums", 3 * rows, device),
            kernels.address(grad_value_N, "grad_value", rows, device),
        )  # fmt: skip
        kernels.call(teacher, "pair_gradient", pair, entries, described, *kernels.threads(teacher))
        if inplace:
            torch.autograd.graph.increment_version(student)
        return out
    views = _row_views(teacher, student, out)
    for (a, b, c), span in zip(views, spans(a for a, _, _ in views), strict=True):
        scale, sums, grad_value = (x[span] for x in (scale_N5, sums_N3, grad_value_N))
        inverse = 1.0 / temperature
        pair_reference.gradient(a, b, c, scale, sums, grad_value, *form.arguments, shard.valid, inverse)
    return out


def _row_views(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return views [N, V] of tensors of one shape that hold the same rows of each, in order."""
    views = [row_views(x) for x in tensors]
    if all(len(v) == 1 for v in views):
        return list(zip(*views, strict=True))
    return [pair for parts in zip(*(x.unbind(0) for x in tensors), strict=True) for pair in _row_views(*parts)]


def _pair(first: torch.Tensor, second: torch.Tensor, shard: Shard, temperature: float):
    """Describe two tensors of logits to the kernels; raises ValueError for what they would read beyond their memory."""
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        raise ValueError(f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)} are no pair")
    rows, *layout = kernels.layout_of(first, shard)
    return kernels.native.Pair(
        first.data_ptr(), second.data_ptr(), kernels.DTYPES[first.dtype], layout, kernels.layout_of(second, shard)[1:],
        rows, first.shape[-1], shard.valid, 1.0 / temperature,
    )  # fmt: skip


def _entries(scale_N5: torch.Tensor, teacher: torch.Tensor, form: Form):
    scale = kernels.address(scale_N5, "scale", 5 * kernels.count_rows(teacher), teacher.device)
    return kernels.native.Entries(scale, *form.arguments)
