"""Facts that all ranks must have in common before they train together: code, configuration, data."""

import hashlib
import inspect
from pathlib import Path

from megatron_egrsd.config import Config
from megatron_egrsd.data.samples import Prompt
from megatron_egrsd.engine.distributed import Facts
from megatron_egrsd.objectives.load import load_objective

# Not by the package's name: from the folder above a clone of the same name, Python takes the clone for the package.
_PACKAGE = Path(__file__).parents[1]

HINTS = {
    "code": "install the same version of megatron_egrsd, and of the file of objective.function, on every node",
    "configuration": "start every node with the same command and configuration file",
    "data": "give every node the same files of problems and the same tokenizer",
}


def facts(config: Config, prompts: list[Prompt]) -> Facts:
    """Return the hash of each, with its hint, by the names in HINTS."""
    code = hashlib.sha256()
    objective = inspect.getfile(type(load_objective(config.objective)))
    for path in (*sorted(_PACKAGE.rglob("*.py")), Path(objective)):
        code.update(path.read_bytes())
    hashes = {
        "code": code.hexdigest(),
        "configuration": hashlib.sha256(repr(config).encode()).hexdigest(),
        "data": hashlib.sha256(repr(prompts).encode()).hexdigest(),
    }
    return {name: (value, HINTS[name]) for name, value in hashes.items()}
