"""samples.jsonl: every sample of an evaluation, one per line. An interrupted evaluation resumes from it.

The first line holds the sampling settings. A line is written at once, so an interruption leaves at most one incomplete
line at the end, which the next start cuts off.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.system.files import lock

Key = tuple[str, str, int]  # set, problem, index of the sample


class SampleFile:
    """The samples so far, and the file to which samples are appended; made, with its directory, if it is missing.

    Raises BadArgument if its samples have other `settings` than these, it is no sample file, or another process writes.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by close()
        try:
            lock(self.file, f"another process is writing {path}; wait for it, or choose another output")
            self._read(settings)
        except BaseException:
            self.close()
            raise

    def append(self, row: dict[str, Any]) -> None:
        """Add a sample with the fields `set`, `id` and `index`. Raises RunError if the disk is full."""
        self._write(row)
        self.rows[_key(row)] = row

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, settings: dict[str, Any]) -> None:
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if number == 1:
                    before = dict(row["settings"])
                else:
                    self.rows[_key(row)] = row
            except (ValueError, KeyError, TypeError):
                raise BadArgument(f"{self.path}, line {number}: not a line that an evaluation writes") from None
        if self.rows:
            self._check(before, settings)
        else:
            os.truncate(self.path, 0)
            self._write({"settings": settings})

    def _check(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key in dict.fromkeys([*now, *before]):
            if before.get(key) != now.get(key):
                raise BadArgument(
                    f"{self.path} was sampled with {key} = {before.get(key)!r}, not {now.get(key)!r}; "
                    "choose another output"
                )

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}") from None


def _key(row: dict[str, Any]) -> Key:
    return row["set"], row["id"], row["index"]
