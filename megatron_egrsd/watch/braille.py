"""A curve in characters: every character of Unicode's braille block is a picture of two by four dots."""

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column
_BLANK = 0x2800


def curve(values: Sequence[float], width: int, height: int, low: float, high: float) -> list[str]:
    """Return `height` lines of `width` characters that show `values` from `low` to `high`, over the whole width.

    More values than columns of dots are averaged; between fewer the line is straight. A value that is not finite is a
    gap.
    """
    columns, rows = 2 * width, 4 * height
    dots: set[tuple[int, int]] = set()
    before = None
    for x, value in enumerate(_resampled(values, columns)):
        if not math.isfinite(value):
            before = None
            continue
        share = (value - low) / (high - low) if high > low else 0.5
        y = round((1 - min(1.0, max(0.0, share))) * (rows - 1))
        # A steep line stays connected: the dots between this column's and the last one's.
        start = y if before is None else before + (1 if y > before else -1 if y < before else 0)
        dots |= {(x, row) for row in range(min(start, y), max(start, y) + 1)}
        before = y
    return ["".join(_cell(dots, 2 * column, 4 * row) for column in range(width)) for row in range(height)]


def _cell(dots: set[tuple[int, int]], x: int, y: int) -> str:
    mask = sum(
        bit for row, bits in enumerate(_DOTS) for column, bit in enumerate(bits) if (x + column, y + row) in dots
    )
    return chr(_BLANK + mask) if mask else " "


def _resampled(values: Sequence[float], columns: int) -> list[float]:
    count = len(values)
    if count == 0:
        return []
    if count == 1:
        return [values[0]] * columns
    if count <= columns:
        places = [x * (count - 1) / (columns - 1) for x in range(columns)]
        return [_between(values[math.floor(p)], values[math.ceil(p)], p - math.floor(p)) for p in places]
    return averaged(values, columns)


def averaged(values: Sequence[float], count: int) -> list[float]:
    """Return the means of `count` parts of `values`, each of its finite ones; NaN if it has none."""
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    finite = [[v for v in part if math.isfinite(v)] for part in parts]
    return [sum(part) / len(part) if part else math.nan for part in finite]


def _between(a: float, b: float, share: float) -> float:
    return a if share == 0 else a + share * (b - a)
