"""Replacing functions of another project, wherever it looks them up.

Projects bind such functions by `from module import name`, in worker processes, at import. So a replacement has to reach
the module that defines the name, every module that has bound it already, and every one that will.
"""

import importlib.abc
import sys
from collections.abc import Container, Mapping
from typing import Any, ClassVar


def replace(module: str, replacements: Mapping[str, Any], newer: Container[str] = ()) -> None:
    """Set names of `module` to `replacements`: now if it is imported, else as soon as it is.

    Names in `newer` are set if the project's version has them. Raises AttributeError if the module is imported and
    lacks another: the project has moved it, and a replacement that nothing calls would go unnoticed.
    """
    if module in sys.modules:
        _apply(module, replacements, newer)
    else:
        _AfterImport.of(module).actions.append(lambda: _apply(module, replacements, newer))


def _apply(module: str, replacements: Mapping[str, Any], newer: Container[str]) -> None:
    owner = sys.modules[module]
    for name, new in replacements.items():
        if not hasattr(owner, name):
            if name in newer:
                continue
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
    """Finder that runs actions once a module has been imported. It leaves the finding to the others."""

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
        # To find is not to import (importlib.util.find_spec asks whether a module is there): the hook stays until then.
        finders = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if module.__name__ == self.module:  # a loader may serve several modules
                    self._run()

            spec.loader.exec_module = exec_module
        return spec

    def _run(self) -> None:
        for action in self.actions:
            action()
        if self.waiting.pop(self.module, None):
            sys.meta_path.remove(self)
