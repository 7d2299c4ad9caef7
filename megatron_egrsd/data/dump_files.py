"""The files of a run's dumps: a directory of rollouts or scores has step_NNNNNN.jsonl for each step, from 1."""

import re
from pathlib import Path


def dump_path(directory: Path, step: int) -> Path:
    """Return the file of `step` in a directory of dumps."""
    return directory / f"step_{step:06d}.jsonl"


def dump_step(path: Path) -> int:
    """Return the step of a file that `dump_path` names."""
    return int(path.stem.removeprefix("step_"))


def dumps_in(directory: Path) -> dict[int, Path]:
    """Return the files of a directory of dumps by step, in the order of the steps; {} if it is missing."""
    found = [path for path in directory.glob("step_*.jsonl") if re.fullmatch(r"step_\d+", path.stem)]
    return {dump_step(path): path for path in sorted(found, key=dump_step)}
