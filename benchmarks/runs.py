"""Training runs as processes of their own, for the benchmarks."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ["--config", str(ROOT / "examples/configs/tiny_cpu.yaml")]
TRAIN = [sys.executable, "-m", "megatron_egrsd.cli", "train", *CONFIG]


def words(section: str, **values: object) -> tuple[str, ...]:
    """Return the words of `megatron-egrsd train`'s command line that set keys of a section of the configuration."""
    return tuple(word for key, value in values.items() for word in (f"--{section}.{key}", str(value)))


# The paper's GRPO shares its trainer (appendix B and Table A1): the running advantage of the shaped reward, one rollout
# a prompt, one REINFORCE update.
PAPER_GRPO = (*words("objective", preset="grpo", advantage="running", length_bonus=0.5, loss="reinforce"),
              *words("rollout", rollouts_per_prompt=1))  # fmt: skip


def run(command: list[str], threads: int, name: str) -> None:
    """To the end of `command`, from the repository; where it fails, exits with the last line that it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        sys.exit(f"{Path(sys.argv[0]).name}: error: {name} failed: {last}")


def reason_in(log: Path, start: int = 0) -> str:
    """Return why a process has failed, "" if its log does not say: the program's own last error, else the last line.

    The process began to write at byte `start` of the log.
    """
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("megatron-egrsd: error:")]
    return (own or lines or [""])[-1]


def metrics(path: Path) -> list[dict]:
    """The rows of the metrics.jsonl of the run at `path`."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
