"""Which divergence of two distributions, as its user asks for it."""

import math
from dataclasses import dataclass

from megatron_egrsd.vocab_parallel.pair_ops import KINDS, Form


@dataclass(frozen=True)
class DivergenceForm:
    """The options of `divergence` and `linear_divergence` that decide what they compute; their meaning is there.

    Raises ValueError for a kind or an option that they refuse.
    """

    kind: str
    entry_clip: float | None = None
    beta: float = 0.5

    def __post_init__(self):
        check_form(self.kind, self.entry_clip, self.beta)


def check_form(kind: str, entry_clip: float | None, beta: float) -> Form:
    """Return the checked form of a divergence. Raises ValueError."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if entry_clip is not None and not entry_clip > 0:
        raise ValueError(f"entry_clip must be above 0, got {entry_clip}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}: use forward_kl or reverse_kl for the ends")
    return Form(kind, math.inf if entry_clip is None else entry_clip, beta)
