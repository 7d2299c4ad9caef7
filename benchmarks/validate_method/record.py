"""The record of a run, beside its directory: what it was made with, when, and on what."""

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import commit, processor
from benchmarks.runs import ROOT
from benchmarks.validate_method.hypotheses import CONFIG
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.system.files import write_text


def begin_record(run: Path, words: list[str]) -> None:
    """Write `run`.json, before the run begins: words, configuration, time in seconds, commit and machine."""
    now = {"began": time.time(), "commit": commit(), "machine": machine()}
    write_text(_path(run), json.dumps(_identity(words) | now, indent=1))


def end_record(run: Path) -> None:
    """Add the time and the load average at the end of a run."""
    now = {"ended": time.time(), "load": os.getloadavg()[0]}
    write_text(_path(run), json.dumps(read_record(run) | now, indent=1))


def read_record(run: Path) -> dict[str, Any]:
    """Return the record of a run, {} if there is none."""
    try:
        return json.loads(_path(run).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def check_same(run: Path, words: list[str]) -> None:
    """Raise BadArgument if a finished run was made with other words, or with another configuration."""
    found = read_record(run)
    for key, value in _identity(words).items():
        if found.get(key) != value:
            raise BadArgument(
                f"{run} was made with another {key} than that of now; choose another --output, or remove the runs there"
            )


def machine() -> str:
    """Return the number of cores and the processor's name, such as "2 cores of AMD EPYC"."""
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}"


def _path(run: Path) -> Path:
    return run.with_name(f"{run.name}.json")


def _identity(words: list[str]) -> dict[str, Any]:
    return {"words": words, "configuration": yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))}
