"""`python -m megatron_egrsd.rollout.launch ARGS`: SGLang's own server, also where torchvision cannot be imported.

SGLang imports torchvision at the top of its configurations of vision-language models, whatever model it serves; on
PyPI torchvision is linked to CUDA and fails to import beside a CPU build of torch (and then breaks transformers in
the training process too, so `requirements/cpu.txt` leaves it out). A text model never calls it: here an empty
package takes its place. Nothing happens where torchvision works.

SGLang's children are spawned, and a spawned child first imports the main module of its parent, which is this one:
the replacement stands in the scheduler and the detokenizer too, before they import SGLang.
"""

import logging
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from megatron_egrsd.rollout.launch_guard import KEY_VARIABLE, die_with_parent


class _Absent(ModuleType):
    """A module whose every public name is a class that refuses to be used."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)  # inspect and importlib ask for these and take no for an answer

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
    sys.modules["torchvision"] = None  # makes transformers find, and remember, that there is none
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
    """SGLang logs all its arguments at the start, the API key among them: every log record loses it."""
    make = logging.getLogRecordFactory()

    def record(*args, **kwargs) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.msg, made.args = made.getMessage().replace(secret, "***"), ()
        return made

    logging.setLogRecordFactory(record)


# At import, so that the spawned children do it as well.
die_with_parent()
replace_missing_torchvision()
if key := os.environ.get(KEY_VARIABLE):
    keep_out_of_the_log(key)

if __name__ == "__main__":
    import runpy

    if key:
        sys.argv += ["--api-key", key]
    runpy.run_module("sglang.launch_server", run_name="__main__")
