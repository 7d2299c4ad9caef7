"""The reproduction of the paper's tables with the tiny model in place of 8B: real cells."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reproduce_paper.__main__ import main  # noqa: E402
from megatron_egrsd.evaluation.protocol import SETS  # noqa: E402

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


def test_a_cell_that_fails_is_named_and_the_others_go_on(words, tmp_path, capsys):
    fresh = [word.replace(words[1], str(tmp_path / "out")) for word in words]
    broken = tmp_path / "out/cells/8b/sft/seed-0/train"
    broken.parent.mkdir(parents=True)
    broken.write_text("a file in the place of the run's directory")
    assert main([*fresh[:-1], "8b/untrained", "8b/sft", "8b/egrsd"]) == 1
    said = capsys.readouterr()
    assert "failed: 8b/sft/seed-0: megatron-egrsd: error: " in said.err and "train.log" in said.err
    assert "2 of 41 settings have a finished run" in (tmp_path / "out/page.html").read_text()
