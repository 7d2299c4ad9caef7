"""A stand-in for `megatron-egrsd train` and `evaluate`: the same files and signals, numbers made up from a cell's name.

python made_up_cell.py train|evaluate DIRECTORY. A file DIRECTORY/../PLACE makes it fail, or stop the process that
started it, at that place, once: fail-train, stop-train, stop-between, fail-evaluate, stop-evaluate.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

STEPS = 4
SETS = {"aime24": (3, 5), "aime25": (3, 1), "hmmt25": (3, 1), "math500": (6, 1), "minerva": (4, 1), "gsm8k": (8, 1)}
command, directory = sys.argv[1], Path(sys.argv[2])
cell = "/".join(directory.parts[-4:-1])
terminated = []


def place(name: str) -> None:
    """Fail, or interrupt the parent and wait for its signal, if the test has asked for it."""
    for kind in ("fail", "stop"):
        mark = directory.parent / f"{kind}-{name}"
        if mark.exists():
            mark.unlink()
            if kind == "fail":
                sys.exit("Traceback ...\nmegatron-egrsd: error: made to fail\nclosing")
            os.kill(os.getppid(), signal.SIGTERM)
            while not terminated:
                time.sleep(0.01)


def train() -> None:
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(1))
    checkpoint, draw = directory / "checkpoint", random.Random(cell)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "optimizer/grad_norm": draw.uniform(0.02, 0.08)} for step in range(1, STEPS + 1)]
    for step in range(int(checkpoint.read_text()) if checkpoint.exists() else 0, STEPS):
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: step + 1]))
        checkpoint.write_text(str(step + 1))
        if step == 1:
            place("train")
        if terminated:
            sys.exit(0)  # saved
    (directory / "adapter").mkdir()
    place("between")


def evaluate() -> None:
    signal.signal(signal.SIGINT, lambda *_: terminated.append(1))
    directory.mkdir(parents=True, exist_ok=True)
    samples, draw = directory / "samples.jsonl", random.Random(cell)
    done = len(samples.read_text().splitlines()) - 1 if samples.exists() else -1
    rows, shares = [{"settings": {}}], {}
    for name, (problems, k) in SETS.items():
        right = 0
        for problem in range(problems):
            for index in range(k):
                reward = float(draw.random() < 0.6)
                right += reward
                rows.append({"set": name, "id": str(problem), "index": index, "reward": reward,
                             "tokens": draw.randint(5_000, 20_000)})  # fmt: skip
        shares[name] = right / problems / k
    for number, row in enumerate(rows):
        if number > done:
            with samples.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if number == 7:
            place("evaluate")
        if terminated:
            sys.exit(130)
    accuracy = {name: {"value": x, "low": max(0, x - 0.1), "high": min(1, x + 0.1)} for name, x in shares.items()}
    sets = {name: {"k": SETS[name][1], "accuracy": estimate} for name, estimate in accuracy.items()}
    content = {"sets": sets, "protocol": {"overridden": {"evaluation.rollouts_per_problem": 1}}}
    (directory / "results.json").write_text(json.dumps(content))


{"train": train, "evaluate": evaluate}[command]()
