"""The table before/after, the pictures and the report page, all from a run's metrics.jsonl."""

import io
import json
import re

import pytest
import yaml

from megatron_egrsd import report
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report import command
from megatron_egrsd.report.figures import phases
from megatron_egrsd.report.runs import accuracy_interval, read_run, read_runs
from megatron_egrsd.run.log import RunLog

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


def make_run(path, steps=3, objective=None, **metrics):
    log = RunLog(path, steps, tensorboard=False, file=io.StringIO())
    log.evaluation(0, BEFORE)
    for step in range(1, steps + 1):
        times = {"time/generate": 2.0, "time/score": 1.0, "time/train": 1.5, "time/sync": 0.25, "time/step": 5.0}
        shares = {"accuracy": 0.5, "gate/mean": 0.9, "student/entropy": 0.3, "teacher/entropy": float("nan")}
        log.step({"step": step, "batch/tokens": 1000.0, **times, **shares, **metrics})
    log.evaluation(steps, AFTER)
    log.close()
    if objective is not None:
        (path / "config.yaml").write_text(yaml.safe_dump({"objective": objective}))
    return path


def test_table():
    lines = report.summary_table(BEFORE, AFTER).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:2] == ["held-out", "(64"]
    cells = {line[:36].strip(): line[36:].split() for line in lines}
    assert cells["accuracy (avg@8)"] == ["50.0%", "95.0%", "+45.0", "pts"]
    assert cells["response length, mean"] == ["100.0", "50.0", "-50.0", "%"]
    assert cells["truncated responses"] == ["10.0%", "0.0%", "-10.0", "pts"]
    assert "pass@8" in cells
    recorded = AFTER | {"accuracy/low": 0.75, "accuracy/high": 1.0}
    interval = report.summary_table(BEFORE, recorded).splitlines()[4]
    assert " ".join(interval.split()) == "its 95 % interval 38-62 % 75-100 %"


def test_the_table_shows_the_interval_of_the_change():
    recorded = AFTER | {"accuracy/change/low": 0.402, "accuracy/change/high": 0.5}
    with_it, without = (report.summary_table(BEFORE, after).splitlines()[4] for after in (recorded, AFTER))
    assert len(with_it) == len(without) and with_it.endswith("  +40 to +50") and without.endswith(" " * 13)


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
    run = make_run(tmp_path / "mine", objective={"mix": 0.0, "attenuation": 0.0})
    command.main([str(run)])
    out = capsys.readouterr().out
    assert "+45.0 pts" in out and out.splitlines()[-1] == str(run / "report.html")
    assert size(run / "frontier.png") == (1500, 750)
    assert all(size(run / f"{name}.png")[0] == 1500 for name in ("training", "gate", "time"))
    page = (run / "report.html").read_text()
    assert "GRPO (w = 1, ω = 1)" in page and "95.0 %" in page and "−50.0 %" in page
    assert page.count("<svg") == 4
    assert not [p for p in run.iterdir() if p.name.endswith(".partial")]
    # Nothing is fetched: no address but the names of XML's vocabularies.
    assert set(re.findall(r"https?://[^\s\"')<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)


@pytest.mark.heavy
def test_several_runs_in_one_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / seed / "run") for seed in ("a", "b", "c&<d>")]
    command.main([*map(str, runs)])
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "report/report.html" and "a/run" in out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "3 runs compared" in page and "c&amp;&lt;d&gt;/run" in page and "<d>" not in page
    assert read_runs(runs)[1].name == "b/run"
    with pytest.raises(BadArgument, match="twice"):
        read_runs([runs[0], runs[0]])


def test_the_last_row_of_a_step_counts_and_a_run_without_evaluation_has_a_page(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=4)
    log = RunLog(run, 4, tensorboard=False, file=io.StringIO())
    log.step({"step": 2, "time/step": 7.0})  # a resumed run repeats its steps
    log.evaluation(4, BEFORE)
    log.close()
    read = read_run(run)
    assert [s["step"] for s in read.steps] == [1, 2, 3, 4] and read.steps[1]["time/step"] == 7.0
    assert [e["step"] for e in read.evaluations] == [0, 4] and read.evaluations[1] == BEFORE | {"step": 4}
    assert phases(read)["other"].tolist() == [0.25, 7.0, 0.25, 0.25]

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    command.main([str(bare)])
    assert "no evaluation" in capsys.readouterr().out
    assert report.read_evaluations(run) == read.evaluations
    with pytest.raises(BadArgument, match="no evaluation"):
        report.read_evaluations(bare)
    assert (bare / "training.png").exists() and not (bare / "frontier.png").exists()

    begun = tmp_path / "begun"  # evaluated, and not trained yet
    begun.mkdir()
    (begun / "metrics.jsonl").write_text(json.dumps({"step": 0, "evaluation/accuracy": 0.5}) + "\n")
    command.main([str(run), str(begun), "--output", str(tmp_path / "both")])
    assert "begun" in (tmp_path / "both" / "report.html").read_text()


def test_interval():
    """Wilson's interval, by the numbers of his paper's formula for 32 of 64, and the run's own if there is one."""
    low, high = accuracy_interval(BEFORE)
    assert (low, high) == (pytest.approx(0.3810, abs=1e-4), pytest.approx(0.6190, abs=1e-4))
    low, high = accuracy_interval(BEFORE | {"accuracy": 1.0})
    assert 0.9 < low < 1 and high == pytest.approx(1)
    assert accuracy_interval(BEFORE | {"accuracy/low": 0.45, "accuracy/high": 0.56}) == (0.45, 0.56)


def test_what_is_no_run(tmp_path):
    with pytest.raises(BadArgument, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(BadArgument, match="no step and no evaluation"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert [row["step"] for row in read_run(tmp_path).steps] == [1]  # the last line is still being written
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    with pytest.raises(BadArgument, match="line 2"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "x", "y"], "no further ones"),
        (["run", "--step", "3"], "belong to --tokens"),
        (["--tokens", "x", "--groups", "a"], "no list of numbers"),
        (["--tokens", "/no/such"], "no scored rollouts"),
        (["--frontier"], "unrecognized arguments"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(BadArgument, match=words):
        command.main(arguments)


def test_help(capsys):
    with pytest.raises(SystemExit, check=lambda error: error.code == 0):
        command.main(["--help"])
    assert "--tokens" in capsys.readouterr().out
