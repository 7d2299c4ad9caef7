"""Whole training runs of the tiny model as processes that can be killed, frozen and started again."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests import copies
from tests.processes import kill, kill_tree, tree

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny" / "model"
PROMPTS, PER_PROMPT = 4, 4


class Run:
    """One start of `megatron-egrsd train`, in a process group of its own.

    `log` holds its output (default: a file beside `output`); `environment` is added to this process's.
    """

    def __init__(
        self, output: Path, *, ranks: int = 1, restarts: int = 0, log: Path | None = None,
        environment: dict[str, str] | None = None, **overrides,
    ):  # fmt: skip
        settings = {
            "config": ROOT / "examples/configs/tiny_cpu.yaml", "model.path": MODEL, "output": output,
            "data.train": ROOT / "examples/tiny/train.jsonl", "data.evaluation": "",
            "rollout.prompts_per_step": PROMPTS, "rollout.rollouts_per_prompt": PER_PROMPT,
            "rollout.servers.max_total_tokens": 16384, "rollout.max_response_tokens": 100,
            "rollout.servers.start_timeout": 150,
            "checkpoint.every": 1, "resume": "auto", **overrides,
        }  # fmt: skip
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += [
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={ranks}",
                f"--max-restarts={restarts}",
            ]
            launcher += ["-m"]
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.log = log or output.parent / f"{output.name}-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*launcher, "megatron_egrsd.cli", "train", *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        kill_tree(self.process.pid)
        self.process.wait(20)

    def all(self) -> list[psutil.Process]:
        """The process, torchrun's ranks and SGLang's processes."""
        return tree(self.process.pid)

    def find(self, *words: str) -> list[psutil.Process]:
        """Return the processes whose command line contains all `words`."""
        found = []
        for process in self.all():
            try:
                if all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found = []
        for process in self.find("megatron_egrsd.cli train"):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "torch.distributed.run" not in " ".join(process.cmdline()):
                    found.append((copies.rank(process), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def await_step(self, step: int, timeout: float = 180) -> None:
        """Wait until metrics.jsonl holds step `step`, or the run has ended."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and max(steps(self.output), default=0) < step:
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def finish(self, timeout: float = 240) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text()}") from None

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def last_word(self) -> str:
        """Return the last line that the command printed."""
        lines = [line for line in self.text().splitlines() if line.startswith("megatron-egrsd: ")]
        assert lines, self.text()
        return lines[0]


def rows(output: Path) -> list[dict]:
    """Return the steps of metrics.jsonl, without a line that is being written."""
    path = output / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [row for line in lines if "loss/policy" in (row := json.loads(line)) or "optimizer/updates" in row]


def steps(output: Path) -> list[int]:
    return [row["step"] for row in rows(output)]


def numbers(output: Path) -> list[dict]:
    """Return the metrics without times."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows(output)]


def write_replay(directory: Path, count: int, seed: int = 0) -> Path:
    """Write `count` batches of made-up responses to the tiny task's prompts, as step_NNNNNN.jsonl."""
    from transformers import AutoTokenizer

    from megatron_egrsd.config import DataConfig
    from megatron_egrsd.data.problems import load_problems
    from megatron_egrsd.data.prompt_builder import PromptBuilder
    from megatron_egrsd.data.samples import Rollout, save_rollouts

    chance = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = DataConfig(teacher_template="{problem} {solution}", enable_thinking=False)
    builder = PromptBuilder(tokenizer, config, 100, 1024)
    problems = load_problems(str(ROOT / "examples/tiny/train.jsonl"), config)
    for step in range(1, count + 1):
        rollouts = []
        for group, problem in enumerate(chance.sample(problems, PROMPTS)):
            prompt = builder.build(problem)
            for k in range(PER_PROMPT):
                ids = [chance.randrange(3, 40) for _ in range(chance.randrange(5, 60))]
                log_probs = [-3 * chance.random() for _ in ids]
                rollouts.append(Rollout(prompt, group, ids, log_probs, "stop", step - 1, "", float((k + group) % 2)))
        save_rollouts(rollouts, directory / f"step_{step:06d}.jsonl")
    return directory


def replayed(directory: Path) -> dict:
    """Return the settings of a run without SGLang."""
    return {"debug": "train-only", "replay": directory, "max_log_prob_difference": 100}


def survive(output: Path, settings: dict) -> tuple[int, int, int]:
    """Two ranks: the only server is killed, then SIGTERM, then too many lost servers, then two more steps to the end.

    Each start continues the last one. Returns the last steps before the kill, before the second and the third start.
    """
    settings = {**settings, "parallel.tensor": 2, "dump_rollouts": "true", "rollout.servers.start_timeout": 300}
    with Run(output, ranks=2, steps=40, **settings) as first:
        first.await_step(2, timeout=400)
        for process in first.find("rollout.launch")[:1]:
            kill(process)
        killed = max(steps(output))
        first.await_step(killed + 3, timeout=400)
        kill(first.ranks()[1], signal.SIGTERM)
        assert first.finish(120) == 0 and "resumable" in first.last_word(), first.text()
    stopped = max(steps(output))
    with Run(output, ranks=2, steps=stopped + 30, **settings, **{"rollout.servers.max_restarts": 0}) as second:
        second.await_step(stopped + 3, timeout=400)
        for process in second.find("rollout.launch")[:1]:
            kill(process)
        assert second.finish(120) == 1, second.text()
        assert "rollout.servers.max_restarts); resumable: step" in second.text()
        assert "never retrieved" not in second.log.read_text()
    ended = max(steps(output))
    with Run(output, ranks=2, steps=ended + 2, **settings) as third:
        assert third.finish(400) == 0, third.text()
    assert steps(output) == list(range(1, ended + 3))
    return killed, stopped, ended
