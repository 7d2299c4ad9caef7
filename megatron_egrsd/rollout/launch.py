"""`python -m megatron_egrsd.rollout.launch ARGS`: SGLang's own server, even if torchvision cannot be imported.

SGLang imports torchvision at the top of its configurations of vision-language models, for every model. PyPI's
torchvision is linked to CUDA and fails to import beside a CPU build of torch (and then breaks transformers in the
training process too, so `requirements/cpu.txt` leaves it out). A text model never calls torchvision, so this module
replaces it by an empty package. It does nothing if torchvision works.

SGLang spawns its children, and a spawned child first imports the main module of its parent, which is this one. So the
scheduler and the detokenizer have the replacement too before they import SGLang.
"""

import logging
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from megatron_egrsd.rollout.launch_guard import KEY_VARIABLE, PARENT_VARIABLE, die_with_parent
from megatron_egrsd.rollout.scratch import SHARED_LIST


class _Absent(ModuleType):
    """A module whose public names are all classes that raise ImportError when they are called."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)  # inspect and importlib look these up and accept that they are missing

        def refuse(*_, **__):
            raise ImportError(f"{self.__name__}.{name} was called, but torchvision cannot be imported here")

        return type(name, (), {"__new__": refuse})


def replace_missing_torchvision() -> None:
    """Put an empty `torchvision` into `sys.modules` if the real one is not installed or cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: its operators belong to another build of torch
        pass
    else:
        return
    # Makes transformers find, and cache, that there is no torchvision.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = _Absent(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


def keep_out_of_the_log(secret: str) -> None:
    """Replace `secret` by *** in every log record: SGLang logs all its arguments at the start, the API key too."""
    make = logging.getLogRecordFactory()

    def record(*args, **kwargs) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.msg, made.args = made.getMessage().replace(secret, "***"), ()
        return made

    logging.setLogRecordFactory(record)


def list_shared_memory(directory: Path) -> None:
    """Let SGLang note its shared memory in `directory` before it is created: a killed server removes none."""
    from sglang.srt.managers.load_snapshot import shm_path_for
    from sglang.srt.server_args import PortArgs

    make = PortArgs.init_new

    def noted(*args, **kwargs) -> PortArgs:
        ports = make(*args, **kwargs)
        with open(directory / SHARED_LIST, "a", encoding="utf-8") as file:
            file.write(f"{Path(shm_path_for(ports.instance_id)).name}\n")
        return ports

    PortArgs.init_new = staticmethod(noted)


# At import, so that the spawned children do the same.
die_with_parent()
replace_missing_torchvision()
if key := os.environ.get(KEY_VARIABLE):
    keep_out_of_the_log(key)

if __name__ == "__main__":
    import runpy

    if key:
        sys.argv += ["--api-key", key]
    if PARENT_VARIABLE in os.environ:
        list_shared_memory(Path(os.environ["TMPDIR"]))
    runpy.run_module("sglang.launch_server", run_name="__main__")
