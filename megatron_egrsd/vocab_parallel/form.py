"""The divergence of two distributions, as its user asks for it."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from megatron_egrsd.vocab_parallel.pair_ops import KINDS, Form


@dataclass(frozen=True)
class DivergenceForm:
    """The options of `divergence` and `linear_divergence` that decide what they compute; their meaning is there.

    Raises ValueError for a kind or an option that they refuse.
    """

    kind: str
    entry_clip: float | None = None
    beta: float = 0.5
    top_k: int | None = None
    top_k_of: str = "student"

    def __post_init__(self):
        check_form(self.kind, self.entry_clip, self.beta)
        check_top_k(self.top_k, self.top_k_of)


class TopK(NamedTuple):
    """The k most probable columns of one of the two models."""

    k: int
    of: str  # "student" or "teacher"


def check_form(kind: str, entry_clip: float | None, beta: float) -> Form:
    """Return the checked form of a divergence. Raises ValueError."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if entry_clip is not None and not entry_clip > 0:
        raise ValueError(f"entry_clip must be above 0, got {entry_clip}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}: use forward_kl or reverse_kl for the ends")
    return Form(kind, math.inf if entry_clip is None else entry_clip, beta)


def check_top_k(k: int | None, of: str) -> TopK | None:
    """Return the checked columns, None for all. Raises ValueError."""
    if k is None:
        return None
    if not isinstance(k, Integral):
        raise ValueError(f"top_k must be a whole number, got {k!r}")
    if k < 1 or of not in ("student", "teacher"):
        raise ValueError(f'top_k must be at least 1 of the "student" or "teacher", got {k} of {of!r}')
    return TopK(k, of)
