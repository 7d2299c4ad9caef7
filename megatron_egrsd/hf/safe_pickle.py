"""Unpickling of checkpoint records that cannot run code chosen by the file."""

import enum
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata


class _Unknown:
    """Stand-in for a class that this process does not need; accepts any state from its pickle."""

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


# The names that torch.distributed.checkpoint (and its dependencies) write into `.metadata`: classes and one function
# that maps a number to a layout. Whole modules are not allowed: they import `os` and hold functions that write files.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def _member(cls: type, name: str) -> Any:
    """Replace `getattr`, for enumerations only: Python 3.11.2 (Debian 12) pickles their members as getattr calls."""
    if cls is _Unknown:
        return cls()
    if isinstance(cls, enum.EnumType) and name in cls.__members__:
        return cls[name]
    raise ValueError(f".metadata takes {name} from {cls}, which has no place in it and could run code")


class MetadataUnpickler(pickle.Unpickler):
    """Unpickler of `.metadata` that builds torch's checkpoint records and stand-ins, and runs no other code."""

    def find_class(self, module: str, name: str):
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype | torch.layout):
                return found
        return self.unknown(module, name)

    def unknown(self, module: str, name: str) -> type:
        return _Unknown


class _Checker(MetadataUnpickler):
    def unknown(self, module: str, name: str) -> type:
        if module.startswith("pathlib") and name in ("Path", "PosixPath", "PurePosixPath"):
            return _Unknown
        raise ValueError(f".metadata names {module}.{name}, which has no place in it and could run code")


def load_metadata(content: bytes, unpickler: type[MetadataUnpickler] = MetadataUnpickler) -> Metadata:
    """Return the records of a `.metadata` file. Raises ValueError if they name a file elsewhere, any if broken."""
    metadata = unpickler(io.BytesIO(content)).load()
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != str(info.relative_path):
            raise ValueError(f".metadata names {info.relative_path!r}, which is not beside it")
    return metadata


def check_metadata(content: bytes) -> None:
    """Raise ValueError if `content` (a `.metadata` file) is no pickle or holds more than records of files beside it."""
    try:
        load_metadata(content, _Checker)
    except ValueError:
        raise
    except Exception as error:  # a broken pickle raises whatever it likes
        raise ValueError(f".metadata cannot be read ({type(error).__name__}: {error})") from None


def load_without_code(content: bytes) -> Any:
    class Safe:
        """The `pickle_module` for torch.load: Namespaces, containers and dtypes; stand-ins for all other classes."""

        class Unpickler(MetadataUnpickler):
            def find_class(self, module: str, name: str):
                if (module, name) in (("argparse", "Namespace"), ("types", "SimpleNamespace")):
                    return pickle.Unpickler.find_class(self, module, name)
                return super().find_class(module, name)

        load = pickle.load

    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False, pickle_module=Safe)
