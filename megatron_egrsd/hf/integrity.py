"""integrity.json, megatron-core's list of the SHA-256 sums of all other files of a torch_dist directory."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_egrsd.system.files import sha256

INTEGRITY = "integrity.json"
UNLISTED = "is not one of its files"

_READERS = 8  # threads


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

    def wrong(name: str) -> str:
        try:
            return "" if sha256(directory / name) == listed[name] else "is not what was written (SHA-256)"
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    found = dict.fromkeys(present - listed.keys(), UNLISTED) | dict.fromkeys(listed.keys() - present, "is missing")
    both = sorted(present & listed.keys())
    with ThreadPoolExecutor(_READERS) as readers:
        found |= zip(both, readers.map(wrong, both), strict=True)
    return {name: what for name, what in found.items() if what}
