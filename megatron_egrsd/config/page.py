"""The page docs/reference/configuration.md, generated from the dataclasses (see `_HEAD`)."""

import dataclasses
import json
import re
import types
import typing

import docstring_parser

from megatron_egrsd.config import Config

_HEAD = """\
# Configuration

Every key of `megatron-egrsd train` and `megatron-egrsd evaluate`. Write keys in the YAML file as sections, or on the
command line with dots; the later value wins. Older names keep working (`RENAMED` in
[config_reader.py](../../megatron_egrsd/config_reader.py)).

This page is generated: `python -m megatron_egrsd.config.page > docs/reference/configuration.md`.
"""


def page() -> str:
    """Return the page as Markdown: a table of key, type, default and meaning for each section."""
    return "\n".join([_HEAD, *_sections(Config, "")])


def _sections(cls: typing.Any, prefix: str) -> list[str]:
    """Return the table of `cls` and of the sections within, each below a heading of its own."""
    text = docstring_parser.parse(cls.__doc__)
    meanings = {p.arg_name: p.description for p in text.params}
    fields = dataclasses.fields(cls)
    inner = [f for f in fields if dataclasses.is_dataclass(f.type)]
    rows = [
        f"| `{prefix}{f.name}` | {_type(f.type)} | {_default(f)} | {_markdown(meanings[f.name])} |"
        for f in fields
        if f not in inner
    ]
    about = " ".join(filter(None, (text.short_description, text.long_description)))
    head = [f"## {prefix.removesuffix('.') or 'Run'}", "", _markdown(about), ""]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return head + table + [line for f in inner for line in _sections(f.type, f"{prefix}{f.name}.")]


def _type(kind: typing.Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in typing.get_args(kind))
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is types.NoneType else part.__name__ for part in typing.get_args(kind))
    return str(kind).replace("typing.", "") if typing.get_args(kind) else kind.__name__


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"`{json.dumps(value)}`"


def _markdown(text: str) -> str:
    """Join the lines, escape Markdown's characters, and link the pages that are named."""
    text = " ".join(text.split()).replace("|", r"\|").replace("*", r"\*")
    return re.sub(r"docs/(\w+)/(\w+)\.md", r"[\2](../\1/\2.md)", text)


if __name__ == "__main__":
    print(page(), end="")
