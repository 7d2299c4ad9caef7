"""Configuration from a YAML file and dotted command-line overrides; a mistake is one sentence with the nearest key."""

import dataclasses
import difflib
import functools
import json
import os
import re
from typing import Any

from megatron_egrsd.config import BenchmarksConfig, Config, ObjectiveConfig, ServersConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.evaluation.protocol import protocol_keys
from megatron_egrsd.objectives import presets

# Keys under an older name, on the command line and in YAML files, config.yaml of an older run among them.
RENAMED = {
    **{
        f"rollout.{f.name}": f"rollout.servers.{f.name}"
        for f in dataclasses.fields(ServersConfig)
        if f.name not in ("tensor_parallel", "args")  # see below
    },
    **{f"evaluation.{f.name}": f"evaluation.benchmarks.{f.name}" for f in dataclasses.fields(BenchmarksConfig)},
    "objective.entropy_quantile_floor": "objective.entropy_floor",
    "rollout.engine_tensor_parallel": "rollout.servers.tensor_parallel",
    "rollout.server_args": "rollout.servers.args",
    "rollout.weight_sync": "rollout.sync.transport",
    "rollout.sync_bucket_mib": "rollout.sync.bucket_mib",
    "rollout.verify_sync": "rollout.sync.verify",
    "rollout.sync_timeout": "rollout.sync.timeout",
    "rollout.lora_sync": "rollout.sync.lora",
}
PATHS = (
    "model.path", "lora.init", "data.train", "data.evaluation", "data.reward", "data.teacher_context",
    "objective.function", "output", "replay", "checkpoint.resume", "evaluation.benchmarks.directory",
    "evaluation.benchmarks.like", "evaluation.benchmarks.sets",
)  # fmt: skip
_HOME = re.compile(r"(?:^|(?<==))~[^=]*")
_OLD_OPTION = re.compile(f"--({'|'.join(map(re.escape, RENAMED))})(?=$|[.+=])")


def valid_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the configuration, sections included."""
    keys = []
    for f in dataclasses.fields(cls):
        keys.append(prefix + f.name)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            keys += valid_keys(f.type, prefix + f.name + ".")
    return keys


def nearest_key(key: str) -> str:
    """Return "; did you mean X?" for the valid key most like `key`, or "" if none is like it."""
    keys = valid_keys()
    by_leaf = {old.rpartition(".")[2]: k for old, k in (*RENAMED.items(), *((k, k) for k in reversed(keys)))}
    leaf = key.rpartition(".")[2]
    match = (
        ([by_leaf[leaf]] if leaf in by_leaf else [])  # the right name in the wrong section
        or difflib.get_close_matches(key, keys, 1, 0.75)
        or [by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), 1, 0.6)]
        or difflib.get_close_matches(key, keys, 1, 0.4)
    )
    return f"; did you mean {match[0]}?" if match else ""


def parse_config(arguments: list[str]) -> Config:
    """Read the configuration from command-line words: `--config FILE` and dotted keys, the later winning.

    A preset (objective.preset, evaluation.protocol) in a YAML file is overridden by any key of the file or the command
    line; a preset on the command line by any key there.

    Raises BadArgument naming the key, with the nearest valid one if it is unknown.
    """
    from jsonargparse import ArgumentError

    arguments = [_OLD_OPTION.sub(lambda match: f"--{RENAMED[match[1]]}", word, count=1) for word in arguments]
    parser = _parser()
    try:
        namespace = parser.parse_args(arguments)
        for name, keys in (("objective.preset", preset_keys), ("evaluation.protocol", protocol_keys)):
            if chosen := namespace[name]:
                arguments = _with_keys_of(name, keys(chosen), arguments)
                namespace = parser.parse_args(arguments)
        namespace = parser.instantiate(namespace)
    except BadArgument:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise BadArgument(_one_sentence(str(error))) from None
    config = Config(**{f.name: namespace[f.name] for f in dataclasses.fields(Config)})
    return functools.reduce(_with_home, PATHS, config)


@functools.cache
def _parser() -> Any:
    """Return the parser of the command line; to make it takes as long as to read a configuration with it."""
    import yaml
    from jsonargparse import ArgumentParser, get_loader, set_loader

    set_loader("renamed", lambda text: _renamed(get_loader("yaml")(text)), exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(exit_on_error=False, prog="megatron-egrsd train", parser_mode="renamed")
    parser.add_argument("--config", action="config", help="YAML file with the keys below.")
    parser.add_class_arguments(Config, None)
    return parser


def _with_home(config: Any, key: str) -> Any:
    """Return `config` with the ~ of one of its paths expanded; a set of an evaluation may be NAME=PATH."""
    name, _, rest = key.partition(".")
    value = getattr(config, name)
    if rest:
        return dataclasses.replace(config, **{name: _with_home(value, rest)})
    if isinstance(value, list):
        return dataclasses.replace(
            config, **{name: [_HOME.sub(lambda m: os.path.expanduser(m[0]), word) for word in value]}
        )
    return dataclasses.replace(config, **{name: os.path.expanduser(value)}) if value.startswith("~") else config


def _with_keys_of(name: str, keys: dict[str, object], arguments: list[str]) -> list[str]:
    """Add the keys of a preset: first, or behind the YAML files that its name follows, so that it wins over those.

    Keys on the command line win over the preset wherever they stand: those before such a file are said again.
    """
    places = [i for i, word in enumerate(arguments) if word.partition("=")[0] == f"--{name}"]
    before = arguments[: places[-1]] if places else []
    files = [i for i, word in enumerate(before) if word.partition("=")[0] == "--config"]
    behind = files[-1] + (1 if "=" in arguments[files[-1]] else 2) if files else 0
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
    for i, word in enumerate(arguments[:behind]):
        option, equals, _ = word.partition("=")
        if any(f"{option.rstrip('+')}.".startswith(f"--{key}.") for key in keys):
            words += [word] if equals else arguments[i : i + 2]
    return [*arguments[:behind], *words, *arguments[behind:]]


def _renamed(tree: Any) -> Any:
    """Return a parsed YAML file with the keys of RENAMED under their new names."""
    for old, new in RENAMED.items() if isinstance(tree, dict) else ():
        (section, name), (_, *path) = old.split("."), new.split(".")
        keys = tree.get(section)
        if isinstance(keys, dict) and name in keys:
            value, (*outer, last) = keys.pop(name), path
            for subsection in outer:
                keys[subsection] = keys.get(subsection) or {}
                keys = keys[subsection]
            keys[last] = value
        if old in tree:
            tree[new] = tree.pop(old)
    return tree


def preset_keys(name: str) -> dict[str, Any]:
    """Return the keys that the preset `name` sets, with their values: all of `objective`, and some of other sections.

    BadArgument if there is no such preset.
    """
    table = presets()
    if name not in table:
        raise BadArgument(f"objective.preset is {name!r}; the presets are {', '.join(table)}")
    defaults = {f"objective.{key}": value for key, value in vars(ObjectiveConfig()).items()}
    return defaults | table[name] | {"objective.preset": name}


def _one_sentence(message: str) -> str:
    """Return jsonargparse's message in this project's words, with the nearest valid key. Endless words are cut."""
    message = re.sub(r"(\S{200})\S+", r"\1...", message)
    for pattern in (
        r"unrecognized arguments: --([\w.\-]+)",
        r"Group '([\w.\-]+)' does not accept option '([\w.\-]+)'",
        r"Option '([\w.\-]+)' is not accepted",
    ):
        if match := re.search(pattern, message):
            key = ".".join(match.groups())
            return f"no configuration key is called {key}{nearest_key(key)}"
    if match := re.search(r'Parser key "([\w.]+)":\s+Expected a (.+?)\. Got value: (.*)', message, re.S):
        expected = re.sub(r"<class '(\w+)'>", r"\1", match[2]).replace("typing.", "")
        return f"{match[1]} is {match[3].strip()!r}, but it must be of type {expected}"
    if match := re.search(r'Parser key "config": (.*)', message, re.S):
        message = f"--config: {match[1]}"
    elif match := re.search(r"unrecognized arguments: (.*)", message):
        message = f"{match[1]!r} is no option; configuration keys are written --section.key VALUE"
    elif "must be a mapping" in message:
        message = "a section of the configuration holds a single value; write its keys indented below it"
    elif message.startswith("Unexpected config"):
        message = "the configuration file is empty; it holds sections such as `model:` with their keys below"
    return " ".join(message.split())
