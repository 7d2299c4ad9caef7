"""A module with a planted mistake, for tests that must find it."""

import inspect
from types import ModuleType


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """Return `module` with `new` in place of `old`, which its source must hold exactly once."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    changed = ModuleType(module.__name__)
    exec(compile(source.replace(old, new), "mutant", "exec"), vars(changed))
    return changed
