"""The rules that keep the package's rooms apart, read from its imports.

A room is a package or a module directly below megatron_egrsd. Imports inside functions and under TYPE_CHECKING count.
"""

import ast
import functools
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "megatron_egrsd"
ROOT = Path(__file__).parents[2] / PACKAGE

# Imports go down only. Rooms of one line do not import each other, but for types under TYPE_CHECKING.
LEVELS = [
    {"__main__", "console", "weighting"},  # entry points; the last two are old names, kept for one release
    {"cli"},
    {"command"},
    {"watch"},
    {"train", "config_reader", "doctor"},
    {"run"},
    {"sampling", "fleet", "report", "learn", "evaluation", "planning", "preparation"},
    {"engine", "objectives", "rewards"},
    {"data"},
    {"rollout", "hf"},
    {"config", "vocab_parallel"},
    {"system"},
    {"errors", "__init__"},
]
# The one room that may import an outside package.
OWNER = {"megatron": "engine", "sglang": "rollout", "sglang_router": "rollout", "torchvision": "rollout"}
# Rooms that others take over: the rooms that they may import at run time; outside, torch, numpy and Python's own.
PORTABLE = {"vocab_parallel": set(), "objectives": {"vocab_parallel", "errors", "system"}}
FILES_AT_THE_TOP = 10
LINES_OF_A_CLASS = 150  # in run/
BUILT_BY_OTHERS = {"rollout.cpu_attention.BatchedDecodeBackend"}  # by SGLang, which calls init_forward_metadata


class Import(NamedTuple):
    """One imported name. Files and modules of the package are written without its name: "run.session", "errors"."""

    source: str
    line: int
    target: str  # a file of the package if `inside`, else an outside module
    name: str  # the name taken from it, or ""
    alias: str  # as the importing file calls it
    inside: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: {self.target} {self.name}".rstrip()


@functools.cache
def nodes(text: str) -> list[ast.AST]:
    """Return the nodes of a source that the rules look at."""
    kinds = ast.Import | ast.ImportFrom | ast.If | ast.ClassDef | ast.Attribute
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def read(root: Path = ROOT) -> dict[str, str]:
    """Return the source of every file of the package: {"run.session": text, "run": text of run/__init__.py, ...}."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return sources


def imports(sources: dict[str, str]) -> list[Import]:
    return [found for file, text in sources.items() for found in _imports_of(file, text, sources)]


def _imports_of(file: str, text: str, sources: dict[str, str]) -> Iterator[Import]:
    guarded = {
        id(node)
        for block in nodes(text)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in nodes(text):
        typing = id(node) in guarded
        if isinstance(node, ast.Import):
            for alias in node.names:
                target, inside = _resolve(alias.name, sources)
                yield Import(file, node.lineno, target, "", alias.asname or alias.name, inside, typing)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}, line {node.lineno}: imports are absolute in this project"
            for alias in node.names:
                called = alias.asname or alias.name
                target, inside = _resolve(f"{node.module}.{alias.name}", sources)
                if inside and target in sources and target != "__init__":
                    yield Import(file, node.lineno, target, "", called, True, typing)  # a module taken from a package
                    continue
                target, inside = _resolve(node.module, sources)
                yield Import(file, node.lineno, target, alias.name, called, inside, typing)


def _resolve(module: str, sources: dict[str, str]) -> tuple[str, bool]:
    if module == PACKAGE:
        return "__init__", True
    inside = module.startswith(PACKAGE + ".")
    return (module.removeprefix(PACKAGE + "."), True) if inside else (module, False)


def room(file: str) -> str:
    """Return the package that holds `file`; a room's command.py is a subcommand and stands above the rooms."""
    return "command" if file.endswith(".command") else file.partition(".")[0]


def circles(sources: dict[str, str]) -> list[str]:
    graph: dict[str, set[str]] = {file: set() for file in sources}
    for found in imports(sources):
        if found.inside:
            graph[found.source].add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def arrows(sources: dict[str, str]) -> list[str]:
    """Imports upwards, and sideways ones at run time, between rooms."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    wrong = [f"{file} is in no line of LEVELS" for file in sources if room(file) not in level]
    for found in imports(sources):
        above, below = level.get(room(found.source), 0), level.get(room(found.target), len(LEVELS))
        if not found.inside or room(found.source) == room(found.target) or above < below:
            continue
        if not (found.typing and above == below):
            wrong.append(str(found))
    return wrong


def foreign(sources: dict[str, str]) -> list[str]:
    """Imports of an outside package that another room owns."""
    return [
        str(found)
        for found in imports(sources)
        if not found.inside and OWNER.get(room(found.target), room(found.source)) != room(found.source)
    ]


def undeclared(sources: dict[str, str]) -> list[str]:
    """Imports of an outside package that pyproject.toml does not name; OWNER's are in requirements/ alone."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for names in lists for line in names}
    known = {"yaml" if name == "pyyaml" else name for name in declared} | OWNER.keys() | sys.stdlib_module_names
    return [str(found) for found in imports(sources) if not found.inside and room(found.target) not in known]


def unportable(sources: dict[str, str]) -> list[str]:
    """Imports at run time that would make a room for others need more than torch and numpy."""
    outside = {"torch", "numpy", *sys.stdlib_module_names}
    return [
        str(found)
        for found in imports(sources)
        if room(found.source) in PORTABLE
        and not found.typing
        and room(found.target) not in (PORTABLE[room(found.source)] | {room(found.source)} if found.inside else outside)
    ]


def private_names(sources: dict[str, str]) -> list[str]:
    """Names with an underscore that are imported, or read from a module, of another room."""
    wrong = []
    for found in imports(sources):
        if not found.inside or room(found.source) == room(found.target):
            continue
        if any(map(_is_private, [*found.target.split("."), found.name])):
            wrong.append(str(found))
        if not found.name:
            for node in nodes(sources[found.source]):
                if not (isinstance(node, ast.Attribute) and _is_private(node.attr)):
                    continue
                if ast.unparse(node.value) == found.alias:
                    wrong.append(f"{found.source}, line {node.lineno}: {found.target} {node.attr}")
    return wrong


def _is_private(name: str) -> bool:
    return re.match(r"_(?!_)", name) is not None


def long_classes(sources: dict[str, str]) -> list[str]:
    return [
        f"{file}.{node.name}"
        for file, text in sources.items()
        if room(file) == "run"
        for node in nodes(text)
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= LINES_OF_A_CLASS
    ]


def late_attributes(sources: dict[str, str]) -> list[str]:
    """Attributes that a method gives an object, and neither `__init__` nor the body of its class or of a base does."""
    classes = {
        (file, node.name): node
        for file, text in sources.items()
        for node in nodes(text)
        if isinstance(node, ast.ClassDef)
    }
    taken = {(found.source, found.alias): (found.target, found.name) for found in imports(sources) if found.inside}

    def born(file: str, name: str) -> set[str]:
        file, name = (file, name) if (file, name) in classes else taken.get((file, name), (file, name))
        if (file, name) not in classes:  # of another project
            return set()
        node = classes[file, name]
        fields = [line for line in node.body if isinstance(line, ast.Assign | ast.AnnAssign)]
        names = {
            part.id for field in fields for part in ast.walk(field) if isinstance(part, ast.Name) and _is_set(part)
        }
        given = [_given(method) for method in _methods(node) if method.name == "__init__"]
        return names.union(*given, *(born(file, base.id) for base in node.bases if isinstance(base, ast.Name)))

    return [
        f"{file}.{name}.{attribute}"
        for (file, name), node in classes.items()
        if f"{file}.{name}" not in BUILT_BY_OTHERS
        for method in _methods(node)
        for attribute in sorted(_given(method) - born(file, name))
    ]


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [line for line in node.body if isinstance(line, ast.FunctionDef | ast.AsyncFunctionDef)]


def _given(method: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Return the attributes of `self` that a method sets; autograd's `ctx` is the object of no class."""
    attributes = (node for node in ast.walk(method) if isinstance(node, ast.Attribute) and _is_set(node))
    return {node.attr for node in attributes if ast.unparse(node.value) == "self"}


def _is_set(node: ast.Name | ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store)


RULES = [circles, arrows, foreign, undeclared, unportable, private_names, late_attributes]


@pytest.mark.parametrize("rule", RULES)
def test_package_keeps(rule):
    assert rule(read()) == []


def test_classes_in_run_are_short():
    assert long_classes(read()) == []


def test_top_holds_few_files():
    assert len(list(ROOT.glob("*.py"))) <= FILES_AT_THE_TOP


@pytest.mark.parametrize(
    ("rule", "file", "line"),
    [
        (circles, "errors", "def f():\n    from megatron_egrsd.config import Config"),
        (circles, "hf.mapping", "import megatron_egrsd.hf.convert"),
        (circles, "objectives.signal", "if TYPE_CHECKING:\n    import megatron_egrsd.objectives.interface"),
        (arrows, "data.samples", "from megatron_egrsd.sampling.sampler import Sampler"),
        (arrows, "data.samples", "from megatron_egrsd import learn"),
        (arrows, "config", "def f():\n    from megatron_egrsd.objectives import presets"),
        (arrows, "rollout.client", "if TYPE_CHECKING:\n    from megatron_egrsd.engine.engine import Engine"),
        (arrows, "report.table", "from megatron_egrsd.evaluation.table import evaluation_table"),
        (arrows, "attic.box", "import math"),
        (foreign, "planning.plan", "def f():\n    import megatron.core"),
        (foreign, "vocab_parallel.linear", "from megatron.core import parallel_state"),
        (foreign, "data.packing", "if TYPE_CHECKING:\n    from megatron.core.packed_seq_params import PackedSeqParams"),
        (foreign, "engine.weights", "from sglang.srt import utils"),
        (undeclared, "data.values", "def f():\n    import pandas"),
        (unportable, "vocab_parallel.shard", "from megatron_egrsd.errors import BadArgument"),
        (unportable, "objectives.egrsd", "from megatron_egrsd.config import ObjectiveConfig"),
        (unportable, "objectives.loss", "import transformers"),
        (private_names, "learn", "from megatron_egrsd.engine.weights import _anything"),
        (private_names, "learn", "from megatron_egrsd.engine import weights as w\nw._anything()"),
        (private_names, "learn", "import megatron_egrsd.engine.weights\nmegatron_egrsd.engine.weights._anything"),
        (private_names, "learn", "from megatron_egrsd.engine._hidden import anything"),
        (late_attributes, "run.log", "class Late:\n    def begin(self):\n        self.number, self.name = 1, 2"),
        (late_attributes, "hf.mapping", "class Late:\n    async def begin(self):\n        with f() as self.x: pass"),
        (long_classes, "run.log", "class Long:\n" + "    x = 0\n" * LINES_OF_A_CLASS),
    ],
)
def test_planted_violation_is_found(rule, file, line):
    sources = read()
    sources[file] = sources.get(file, "") + f"\n{line}\n"
    assert set(rule(sources)) - set(rule(read()))


def test_what_the_rules_allow_is_not_reported():
    sources = read()
    allowed = {
        "learn": "from megatron_egrsd.engine.engine import Engine",
        "engine.weights": "import megatron.core",
        "report.table": "if TYPE_CHECKING:\n    from megatron_egrsd.evaluation.table import evaluation_table",
        "objectives.egrsd": "from megatron_egrsd.vocab_parallel import log_ratio",
        "hf.convert": "from megatron_egrsd.hf.mapping import _anything",
        "run.log": "class A:\n    y: int = 0\n    def __init__(self):\n        self.x = 0\n"
        "class B(A):\n    def f(self):\n        self.x, self.y = 1, 1",
    }
    for file, line in allowed.items():
        sources[file] += f"\n{line}\n"
    assert [rule(sources) for rule in RULES] == [rule(read()) for rule in RULES]
