"""The members of the family by name: `--objective.preset NAME`. Any key that is given beside it overrides it."""

_PRESETS = {
    "grpo": {"objective.mix": 0.0, "objective.attenuation": 0.0, "objective.lookahead": 0},
    "rlsd": {"objective.mix": 0.5, "objective.attenuation": 0.0, "objective.lookahead": 0},
    "egrsd": {"objective.mix": 0.5, "objective.attenuation": 0.9, "objective.lookahead": 0},
    "cl_egrsd": {"objective.mix": 0.5, "objective.attenuation": 0.9, "objective.lookahead": 2},
}


def presets() -> dict[str, dict[str, object]]:
    """Return the configuration keys that each preset sets, with their values, by the preset's name."""
    return {name: dict(keys) for name, keys in _PRESETS.items()}
