"""The table before/after, the picture, and both from a run's metrics.jsonl."""

import io

import pytest

from megatron_egrsd import report
from megatron_egrsd.console import RunLog
from megatron_egrsd.errors import BadArgument

BEFORE = {
    "accuracy": 0.5,
    "pass": 0.8,
    "length/mean": 100.0,
    "length/median": 90,
    "length/p95": 200,
    "truncated": 0.1,
    "k": 8.0,
    "problems": 64,
}
AFTER = BEFORE | {"accuracy": 0.95, "length/mean": 50.0, "truncated": 0.0}


def test_table():
    lines = report.summary_table(BEFORE, AFTER).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:2] == ["held-out", "(64"]
    cells = {line[:36].strip(): line[36:].split() for line in lines}
    assert cells["accuracy (avg@8)"] == ["50.0%", "95.0%", "+45.0", "pts"]
    assert cells["response length, mean"] == ["100.0", "50.0", "-50.0", "%"]
    assert cells["truncated responses"] == ["10.0%", "0.0%", "-10.0", "pts"]
    assert "pass@8" in cells


def size(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("count", [1, 2, 30])
def test_plot(tmp_path, count):
    evaluations = [
        BEFORE | {"step": i, "accuracy": 0.5 + 0.01 * i, "length/mean": 100.0 - i} for i in reversed(range(count))
    ]
    report.plot_frontier(evaluations, tmp_path / "f.png")
    assert size(tmp_path / "f.png") == (1500, 750)


def test_plot_of_equal_and_of_broken_evaluations(tmp_path):
    same = [BEFORE | {"step": i} for i in range(3)]
    report.plot_frontier([*same, {"step": 4, "accuracy": None}], tmp_path / "f.png")
    with pytest.raises(BadArgument, match="no evaluation"):
        report.plot_frontier([], tmp_path / "g.png")


def test_report_of_a_run(tmp_path, capsys):
    log = RunLog(tmp_path, 2, tensorboard=False, file=io.StringIO())
    log.evaluation(0, BEFORE)
    log.step({"step": 1, "reward/mean": 0.5})
    log.evaluation(2, BEFORE)
    log.evaluation(2, AFTER)  # a resumed run evaluates a step again: the last one counts
    log.close()
    evaluations = report.read_evaluations(tmp_path)
    assert [e["step"] for e in evaluations] == [0, 2] and evaluations[1] == AFTER | {"step": 2}
    report.main(str(tmp_path))
    assert "+45.0 pts" in capsys.readouterr().out
    assert size(tmp_path / "frontier.png") == (1500, 750)


def test_runs_without_evaluations(tmp_path):
    with pytest.raises(BadArgument, match=r"no metrics\.jsonl"):
        report.read_evaluations(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(BadArgument, match="no evaluation"):
        report.read_evaluations(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(BadArgument, match="line 2"):
        report.read_evaluations(tmp_path)
