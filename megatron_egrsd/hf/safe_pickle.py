"""Unpickling checkpoint records without running code of their choosing."""

import io
import pickle
from typing import Any

import torch


class _Unknown:
    """Stands for a class that this process does not need; takes whatever its pickle gives it."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` without running code of its choosing: torch's checkpoint records and stand-ins, no more."""

    def find_class(self, module: str, name: str):
        if module.startswith("torch.distributed.checkpoint.") or (module, name) in (
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
        ):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype | torch.layout):
                return found
        return _Unknown


def load_without_code(content: bytes) -> Any:
    class Safe:
        """torch.load's `pickle_module`: Namespaces, containers and dtypes; stand-ins for the rest."""

        class Unpickler(MetadataUnpickler):
            def find_class(self, module: str, name: str):
                if (module, name) in (("argparse", "Namespace"), ("types", "SimpleNamespace")):
                    return pickle.Unpickler.find_class(self, module, name)
                return super().find_class(module, name)

        load = pickle.load

    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False, pickle_module=Safe)
