"""Records of checkpoints as any Python writes them, and nothing else."""

import enum
import io
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorProperties

from megatron_egrsd.hf.safe_pickle import MetadataUnpickler, check_metadata


class OtherPython(pickle.Pickler):
    """A pickler that writes members of enumerations as Python 3.11.2 does, or as 3.11.7 does."""

    by_name = True

    def reducer_override(self, value):
        if not isinstance(value, enum.Enum):
            return NotImplemented
        return (getattr, (type(value), value.name)) if self.by_name else (type(value), (value.value,))


def written(value, by_name: bool) -> bytes:
    content = io.BytesIO()
    pickler = OtherPython(content, protocol=4)
    pickler.by_name = by_name
    pickler.dump(value)
    return content.getvalue()


@pytest.mark.parametrize("by_name", [True, False])
def test_an_enumeration_is_read_however_it_was_written(by_name):
    properties = TensorProperties(torch.bfloat16)
    content = written(Metadata({"a": properties, "b": BytesStorageMetadata()}, storage_data={}), by_name)
    assert (b"getattr" in content) == by_name
    check_metadata(content)
    read = MetadataUnpickler(io.BytesIO(content)).load().state_dict_metadata["a"]
    assert read == properties and read.memory_format is torch.contiguous_format


class Taken:
    def __init__(self, owner, name):
        self.taken = owner, name

    def __reduce__(self):
        return getattr, self.taken


@pytest.mark.parametrize("taken", [(Metadata, "__init__"), (Metadata, "__subclasses__"), (enum.Enum, "__members__")])
def test_nothing_but_members_can_be_taken_from_a_class(taken):
    content = pickle.dumps(Metadata({"a": Taken(*taken)}, storage_data={}))
    with pytest.raises(ValueError, match="could run code"):
        check_metadata(content)


def test_functions_are_not_records():
    with pytest.raises(ValueError, match=r"names posix\.system, which has no place in it and could run code"):
        check_metadata(pickle.dumps(Metadata({"a": os.system}, storage_data={})))
