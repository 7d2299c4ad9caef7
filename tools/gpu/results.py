"""The JSON file of a stage: its state, the machine, and the rows that it has measured so far."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from megatron_egrsd.system.files import write_text

RESULT_VARIABLE = "GPU_STAGE_RESULT"  # path of the file of the stage that runs; not set if it runs by hand
ABSENT_STATUS = 77  # exit status of a stage that lacks what it is to measure


def read(directory: Path, stage: str) -> dict[str, Any]:
    """Return the content of a stage's file, {} if there is none."""
    path = directory / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(directory: Path, stage: str, content: dict[str, Any]) -> None:
    write_text(directory / f"{stage}.json", json.dumps(content, indent=1) + "\n")


def record(table: str, **values: Any) -> None:
    """Add a row to `table` of the stage that runs, at once; print it too. A `complaint` says which goal is missed."""
    print(f"{table}: {values}", flush=True)
    _update(lambda content: content["rows"].append({"table": table, **values}))


def absent(reason: str) -> NoReturn:
    """End the stage that runs: what it would measure is not on this machine."""
    print(f"absent: {reason}", flush=True)
    _update(lambda content: content.update(reason=reason))
    sys.exit(ABSENT_STATUS)


def _update(change) -> None:
    if path := os.environ.get(RESULT_VARIABLE):
        directory, stage = Path(path).parent, Path(path).stem
        content = read(directory, stage)
        change(content)
        write(directory, stage, content)
