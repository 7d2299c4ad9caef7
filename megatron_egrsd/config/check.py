"""The check of a configuration value."""

from megatron_egrsd.errors import BadArgument


def require(condition: bool, message: str) -> None:
    """Raise BadArgument with `message` unless `condition` holds."""
    if not condition:
        raise BadArgument(message)
