"""Checks of configuration values."""

import dataclasses
import math
from typing import Any

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


def require_not_negative(section: object, prefix: str, *names: str) -> None:
    """Raise BadArgument for the first field of `section` among `names` that is below 0, as "`prefix`.name"."""
    for name in names:
        value = getattr(section, name)
        require(value >= 0, f"{prefix}.{name} is {value}; it must not be negative")


def require_truncation(section: object, prefix: str) -> None:
    """Raise BadArgument unless the fields `top_p` and `top_k` of `section` leave a token to sample."""
    require(0 < section.top_p <= 1, f"{prefix}.top_p is {section.top_p}; it must lie in (0, 1]")  # type: ignore[attr-defined]
    require_not_negative(section, prefix, "top_k")


def require_finite(section: Any, prefix: str) -> None:
    """Raise BadArgument for the first number of `section`, or of a section within, that is not finite."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            require_finite(value, f"{name}.")
        elif isinstance(value, float):
            require(math.isfinite(value), f"{name} is {value}; it must be a finite number")
