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
    """Run `command` to its end, from the repository; if it fails, exit with the reason that it gave."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if done.returncode:
        reason = last_error(done.stderr) or "no message"
        sys.exit(f"{Path(sys.argv[0]).name}: error: {name} failed: {reason}")


def reason_in(log: Path, start: int = 0) -> str:
    """Return `last_error` of a process that began to write at byte `start` of a log."""
    return last_error(log.read_bytes()[start:].decode(errors="replace"))


def last_error(text: str) -> str:
    """Return why a process that printed `text` failed: the program's own last error, else the last line, else ""."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("megatron-egrsd: error:")]
    return (own or lines or [""])[-1]


def metrics(path: Path) -> list[dict]:
    """Return the rows of the metrics.jsonl of the run at `path`."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
