"""The old name of megatron_egrsd.objectives, kept for one release."""

from megatron_egrsd.objectives.interface import Objective, Tokens

__all__ = ["Objective", "Tokens"]
