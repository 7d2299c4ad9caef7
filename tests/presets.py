"""The objective of a preset."""

from typing import Any

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.config_reader import preset_keys


def preset_objective(name: str, **overrides: Any) -> ObjectiveConfig:
    """Return the objective section of a preset; `overrides` change single fields."""
    keys = {key.partition(".")[2]: value for key, value in preset_keys(name).items() if key.startswith("objective.")}
    return ObjectiveConfig(**keys | overrides)
