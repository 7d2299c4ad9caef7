"""Checks of configuration values."""

from megatron_egrsd.errors import BadArgument


def require(condition: bool, message: str) -> None:
    """Raise BadArgument with `message` unless `condition` holds."""
    if not condition:
        raise BadArgument(message)


def require_positive(section: object, prefix: str, *names: str) -> None:
    """Raise BadArgument for the first field of `section` among `names` that is not above 0, as "`prefix`.name"."""
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{prefix}.{name} is {value}; it must be positive")
