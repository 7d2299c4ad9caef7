"""Import paths of users' functions and classes: "module:name", or "file.py:name" for a file that is not installed."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_egrsd.errors import BadArgument


def load(path: str, key: str) -> Any:
    """Return the object at the import path. Raises BadArgument, which begins with the key `key`, if there is none."""
    source, _, name = path.rpartition(":")
    if not (source and name):
        raise BadArgument(f'{key} is {path!r}; it must be an import path "module:name" or "file.py:name"')
    try:
        module = _run_file(Path(source).resolve()) if source.endswith(".py") else importlib.import_module(source)
        return getattr(module, name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise BadArgument(f"{key} {path!r} cannot be imported: {type(error).__name__}: {error}") from None


@functools.cache
def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look up a class's module here.
    sys.modules[spec.name] = module
    if str(path.parent) not in sys.path:  # modules beside the file become importable; installed ones take precedence
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module
