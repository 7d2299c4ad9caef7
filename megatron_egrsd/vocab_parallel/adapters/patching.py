"""Replacing functions of another project, wherever it looks them up.

Projects bind such functions by `from module import name`, in worker processes, at import. So a replacement has to reach
the module that defines the name, every module that has bound it already, and every one that will.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any, ClassVar


def replace(module: str, replacements: Mapping[str, Any]) -> None:
    """Set names of `module` to `replacements`: now if it is imported, else as soon as it is.

    Raises AttributeError if the module is imported and lacks a name: the project has moved it, and a replacement that
    nothing calls would go unnoticed.
    """
    if module in sys.modules:
        _apply(module, replacements)
    else:
        _AfterImport.of(module).actions.append(lambda: _apply(module, replacements))


def _apply(module: str, replacements: Mapping[str, Any]) -> None:
    owner = sys.modules[module]
    for name, new in replacements.items():
        if not hasattr(owner, name):
            raise AttributeError(f"{module} has no {name}: this adapter was written for another version of it")
        _rebind(getattr(owner, name), new)
        setattr(owner, name, new)


def _rebind(old: Any, new: Any) -> None:
    """Replace `old` in every imported module that has bound it."""
    for other in list(sys.modules.values()):
        names = vars(other) if hasattr(other, "__dict__") else {}
        for name in [name for name, value in list(names.items()) if value is old]:
            setattr(other, name, new)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finder that runs actions once a module has been imported. It leaves the finding to those after it."""

    waiting: ClassVar[dict[str, "_AfterImport"]] = {}

    def __init__(self, module: str):
        self.module, self.actions = module, []

    @classmethod
    def of(cls, module: str) -> "_AfterImport":
        if module not in cls.waiting:
            cls.waiting[module] = cls(module)
            sys.meta_path.insert(0, cls.waiting[module])
        return cls.waiting[module]

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        self.waiting.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                for action in self.actions:
                    action()

            spec.loader.exec_module = exec_module
        return spec
