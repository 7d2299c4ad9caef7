"""How rollouts become token weights, and token weights a loss. Runs on torch alone (docs/guides/extending.md)."""

from typing import TYPE_CHECKING

from megatron_egrsd.objectives.presets import presets

if TYPE_CHECKING:
    from megatron_egrsd.objectives.interface import DivergenceForm, Objective, Tokens

__all__ = ["DivergenceForm", "Objective", "Tokens", "presets"]


def __getattr__(name: str):
    """Import torch when an objective is asked for, not when the table of presets is: the command line reads that."""
    if name in ("DivergenceForm", "Objective", "Tokens"):
        from megatron_egrsd.objectives import interface

        return getattr(interface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
