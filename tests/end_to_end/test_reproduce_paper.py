"""The reproduction of the paper's tables with the tiny model in place of 8B: real cells, interrupted three times."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks.reproduce_paper.__main__ import main
from benchmarks.reproduce_paper.cells import chosen
from megatron_egrsd.evaluation.protocol import SETS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CELLS = ["table3/*"]  # every method; the other tables' cells differ from these in numbers and teachers
TRAIN = "--steps 2 --rollout.prompts_per_step 8 --rollout.max_response_tokens 120 --lora.rank 4 --checkpoint.every 1"
EVALUATE = "--evaluation.rollouts_per_problem 1 --rollout.max_response_tokens 120"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Arguments of the command, with a directory of six small sets."""
    root = tmp_path_factory.mktemp("reproduction")
    lines = (ROOT / "examples/tiny/heldout.jsonl").read_text().splitlines(keepends=True)
    for number, name in enumerate(SETS):
        (root / f"{name}.jsonl").write_text("".join(lines[4 * number : 4 * number + 4]))
    paths = {"output": root / "out", "data": ROOT / "examples/tiny/train.jsonl", "benchmarks": root}
    return [
        *(word for name, path in paths.items() for word in (f"--{name}", str(path))),
        "--model", f"8b={ROOT}/examples/tiny/model", "--config", f"8b={ROOT}/examples/configs/tiny_cpu.yaml",
        "--gpus", "0", f"--train={TRAIN}", f"--evaluate={EVALUATE}", "--cells", *CELLS,
    ]  # fmt: skip


def interrupted_at(path: Path, words: list[str]) -> int:
    """Run the command, and send this process SIGTERM as soon as `path` is there and not empty."""
    ended = threading.Event()

    def strike() -> None:
        while not ended.is_set():
            if path.is_dir() or (path.is_file() and path.stat().st_size):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        return main(words)
    finally:
        ended.set()
        thread.join()


def test_every_cell_is_filled_after_three_interruptions(words, capsys):
    output = Path(words[1])
    cells = output / "cells/8b"
    places = [cells / "untrained/seed-0/evaluation/samples.jsonl", cells / "sft/seed-0/train/checkpoints/step_000001",
              cells / "grpo/seed-0/train/adapter"]  # fmt: skip
    for place in places:
        assert interrupted_at(place, words) == 1
        assert "stopped; the same command goes on from here" in capsys.readouterr().err
    assert main(words) == 0, capsys.readouterr().err

    wanted = {setting.key for setting in chosen(CELLS, ["8b"])}
    assert len(wanted) == 7
    tables = json.loads((output / "numbers.json").read_text())
    rows = [row for table in tables.values() for row in table["rows"] if row["setting"] in wanted]
    assert {row["setting"] for row in rows} == wanted
    for row in rows:
        assert row["state"] == "finished"
        assert all(number["ours"]["value"] is not None for number in row["numbers"].values())
    assert tables["table3"]["rows"][6]["numbers"]["avg"]["paper"] == pytest.approx(69.32, abs=0.01)
    page = (output / "page.html").read_text()
    for key in ("frontier-8b", "gradients-8b", "mechanism-8b"):
        assert f'<figure id="{key}">' in page
    assert "evaluation.rollouts_per_problem = 1" in page and "--lora.rank 4" in page

    before = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*/*/evaluation/results.json")}
    assert len(before) == 7 and main(words) == 0  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert page == (output / "page.html").read_text()


def test_a_cell_that_fails_is_named_and_the_others_go_on(words, tmp_path, capsys):
    fresh = [word.replace(words[1], str(tmp_path / "out")) for word in words]
    broken = tmp_path / "out/cells/8b/sft/seed-0/train"
    broken.parent.mkdir(parents=True)
    broken.write_text("a file in the place of the run's directory")
    assert main([*fresh[:-1], "8b/untrained", "8b/sft", "8b/egrsd"]) == 1
    said = capsys.readouterr()
    assert "failed: 8b/sft/seed-0: megatron-egrsd: error: " in said.err and "train.log" in said.err
    assert "2 of 41 settings have a finished run" in (tmp_path / "out/page.html").read_text()
