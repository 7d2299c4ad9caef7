"""The rows of a tensor [..., V] in memory: which tensors the kernels can walk without a copy.

The kernels count rows over two dimensions, so that logits[:, :-1] and logits.transpose(0, 1) are taken as they are.
"""

from collections.abc import Iterable

import torch

RowLayout = tuple[int, int, int, int]  # rows, rows of the inner dimension, outer stride, inner stride (in elements)


def row_layout(x: torch.Tensor) -> RowLayout | None:
    """Return where the rows of `x` [..., V] lie, or None if its leading dimensions merge into more than two."""
    if x.dim() == 2:  # the usual case, and every call pays for this function
        return x.shape[0], max(x.shape[0], 1), 0, x.stride(0)
    dimensions: list[tuple[int, int]] = []  # (size, stride), merged with the one before wherever strides allow
    rows = 1
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        rows *= size
        if size == 1:
            continue
        if dimensions and dimensions[-1][1] == size * stride:
            dimensions[-1] = (dimensions[-1][0] * size, stride)
        else:
            dimensions.append((size, stride))
    if rows == 0 or not dimensions:
        return rows, max(rows, 1), 0, x.shape[-1]
    if len(dimensions) > 2:
        return None
    inner, inner_stride = dimensions[-1]
    return rows, inner, dimensions[0][1] if len(dimensions) == 2 else 0, inner_stride


def row_views(x: torch.Tensor) -> list[torch.Tensor]:
    """Return views [N, V] that hold the rows of `x` in order: one if its leading dimensions merge."""
    layout = row_layout(x)
    if layout is None or layout[0] in (0, layout[1]):
        return [x.view(-1, x.shape[-1])]
    return [view for part in x.unbind(0) for view in row_views(part)]


def spans(views: Iterable[torch.Tensor]) -> list[slice]:
    """Return which rows of the whole each of the views holds that follow one another."""
    found, first = [], 0
    for view in views:
        found.append(slice(first, first := first + view.shape[0]))
    return found


def overlap(x: torch.Tensor) -> bool:
    """Return whether rows of `x` [..., V] share memory, so that writing one changes another."""
    layout = row_layout(x)
    if layout is None or layout[0] <= 1:
        return False
    rows, inner, outer_stride, inner_stride = layout
    sizes = sorted([(inner_stride, inner), (outer_stride, rows // inner)])  # the innermost stride first
    extent = x.shape[-1]
    for stride, size in sizes:
        if size > 1:
            if stride < extent:
                return True
            extent = stride * (size - 1) + extent
    return False
