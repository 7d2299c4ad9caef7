"""integrity.json, megatron-core's list of the SHA-256 sums of all other files of a torch_dist directory."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_egrsd.hf.byte_ranges import in_threads
from megatron_egrsd.system.files import sha256

INTEGRITY = "integrity.json"
UNLISTED = "is not one of its files"


def write(directory: Path, sums: dict[str, str]) -> None:
    """Write the list of `directory`: the sum of every other file, by its name."""
    content = {"algorithm": "sha256", "files": dict(sorted(sums.items()))}
    (directory / INTEGRITY).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def differing(directory: Path) -> dict[str, str]:
    """Return {name: what is wrong with it} of the files in `directory` that are not as its list says.

    Raises OSError if there is no list, ValueError if it is none.
    """
    content = json.loads((directory / INTEGRITY).read_bytes())
    listed = content.get("files") if isinstance(content, dict) and content.get("algorithm") == "sha256" else None
    if not isinstance(listed, dict):
        raise ValueError(f"{INTEGRITY} is no list of SHA-256 sums")
    present = {file.name for file in directory.iterdir() if file.is_file() and file.name != INTEGRITY}

    found = dict.fromkeys(present - listed.keys(), UNLISTED) | dict.fromkeys(listed.keys() - present, "is missing")

    def compare(name: str) -> Iterator[int]:
        try:
            if sha256(directory / name) != listed[name]:
                found[name] = "is not what was written (SHA-256)"
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror})"
        yield 0

    in_threads(map(compare, sorted(present & listed.keys())), lambda nbytes: None)
    return found
