"""The reproduction of the paper's tables: its plan, claims on cells, interruptions, failures, numbers and page.

Cells are made up by made_up_cell.py.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from scipy import stats

from benchmarks.reproduce_paper import claim, published, schedule
from benchmarks.reproduce_paper.__main__ import main
from benchmarks.reproduce_paper.cells import MODELS, TABLES, Cell, chosen, methods
from benchmarks.reproduce_paper.numbers import Number, Value, of_evaluation, values_of
from benchmarks.reproduce_paper.page import state, write_page
from benchmarks.reproduce_paper.schedule import run_all
from benchmarks.reproduce_paper.site import Command, Site
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.load import check_objective, needs_rollouts, needs_teacher

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("made_up_cell.py")
TABLE_2 = [Cell(setting, 0) for setting in methods("4b").values()]


class MadeUp(Site):
    """A site whose cells are made up."""

    def training(self, cell):
        return Command([sys.executable, str(SCRIPT), "train", str(self.run_of(cell))], {})

    def evaluation(self, cell):
        return Command([sys.executable, str(SCRIPT), "evaluate", str(self.evaluation_of(cell))], {})


def site_in(path: Path, kind=MadeUp, **changes) -> Site:
    models = {name: ROOT / "examples/tiny/model" for name in MODELS}
    return kind(path, models, ROOT / "examples/tiny/train.jsonl", path, {}, **changes)


def ask(site: Site, cell: Cell, place: str) -> None:
    """Let a cell fail or be interrupted at a place of made_up_cell.py."""
    site.directory(cell).mkdir(parents=True, exist_ok=True)
    (site.directory(cell) / place).touch()


# -- the plan ---------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_every_setting_is_the_papers():
    site = site_in(ROOT)
    settings = chosen([], MODELS)
    assert len({s.key for s in settings}) == len(settings) == 41
    configs = {s.key: site.config(Cell(s, 0)) for s in settings}
    for config in configs.values():
        check_objective(config.objective)
        assert (config.steps, config.rollout.rollouts_per_step, config.lora.rank) == (100, 32, 64)
        assert (config.optimizer.lr, config.optimizer.clip_grad) == (5e-6, 0.1)
        if needs_rollouts(config.objective):
            r = config.rollout
            assert (r.temperature, r.top_p, r.top_k, r.max_response_tokens) == (1.1, 0.95, 20, 1024)
    gates = {key: (c.objective.attenuation, c.objective.lookahead) for key, c in configs.items()}
    assert gates["4b/egrsd"] == gates["8b/egrsd"] == (0.3, 0) and gates["4b/cl_egrsd"] == (0.3, 3)
    assert gates["8b/cl_egrsd"] == (1.0, 5) and gates["acereason/cl_egrsd"] == (0.5, 3)
    assert gates["8b/gate_off"][0] == 0 and gates["8b/egrsd-g0.9"] == (0.9, 0)
    assert gates["8b/cl_egrsd-g0.3-w7"] == (0.3, 7) and gates["8b/cl_egrsd-g0.5-w5"] == (0.5, 5)
    teachers = {key: c.teacher for key, c in configs.items() if needs_teacher(c.objective)}
    changing = {key for key, teacher in teachers.items() if teacher.weights != "frozen"}
    assert changing == {"8b/egrsd-ema", "8b/egrsd-copy20", "8b/egrsd-copy50"}
    assert teachers["8b/egrsd-ema"].ema_decay == 0.99 and teachers["8b/egrsd-copy20"].snapshot_every == 20
    grpo = configs["4b/grpo"].objective
    assert (grpo.advantage, grpo.loss, grpo.mix, grpo.attenuation) == ("running", "reinforce", 0.0, 0.0)
    assert [key for key, c in configs.items() if c.dump_scores] == [f"{m}/cl_egrsd" for m in MODELS]


def test_published_averages_are_the_means_of_their_rows():
    averages = {"table6": [68.23, 68.60, 68.05, 69.32, 68.02], "table7": [68.23, 67.83, 67.12, 66.64]}
    for table in TABLES:
        for row, average in zip(table.rows, averages.get(table.key, []), strict=False):
            assert row.paper["avg"] == pytest.approx(average, abs=0.01)
    rows = {table.key: {row.label: row.paper for row in table.rows} for table in TABLES}
    assert rows["table6"]["W 5"] == rows["table3"]["CL-EGRSD"] and rows["table7"]["frozen"] == {
        k: v for k, v in rows["table3"]["EGRSD"].items() if k not in ("avg_len", "eff")
    }
    efficiency = {label: round(row["eff"], 2) for label, row in rows["table5"].items()}
    assert efficiency == {"untrained": 5.96, "SFT": 6.05, "GRPO": 5.58, "OPSD": 5.65, "CRISP": 5.86, "EGRSD": 6.08,
                          "CL-EGRSD": 6.06}  # fmt: skip
    for table in TABLES:
        assert set(table.columns) <= set(published.COLUMNS)
        assert len({row.label for row in table.rows}) == len(table.rows)
    assert rows["tableA4"]["EGRSD"] == {}


def test_cells_are_chosen_by_patterns():
    assert [s.key for s in chosen(["table5/*"], ["4b", "8b"])] == [s.key for s in methods("4b").values()]
    assert [s.key for s in chosen(["8b/egrsd", "table7/*/egrsd"], ["8b"])] == ["8b/egrsd"]
    assert {s.model for s in chosen([], ["8b"])} == {"8b"}
    with pytest.raises(BadArgument, match="no cell is called 'table9"):
        chosen(["table9/*"], ["8b"])


# -- the commands -----------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_commands_of_a_node_with_gpus(tmp_path):
    site = site_in(tmp_path, Site, gpus=8, train=("--steps", "3"), evaluate=("--evaluation.top_p", "0.9"))
    cell = Cell(methods("8b")["egrsd"], 7)
    training = site.training(cell)
    assert training.words[1].endswith("examples/run_qwen3_8b_cl_egrsd.sh") and training.words[-2:] == ["--steps", "3"]
    assert training.variables["SEED"] == "7" and training.variables["OUTPUT"] == str(site.run_of(cell))
    (site.run_of(cell) / "adapter").mkdir(parents=True)
    words = site.evaluation(cell).words[4:]
    config = parse_config(["--data.train", "-", *words])
    assert config.evaluation.protocol == "egrsd_paper" and config.rollout.max_response_tokens == 32768
    assert (config.evaluation.rollouts_per_problem, config.evaluation.temperature) == (4, 1.0)
    assert config.evaluation.top_p == 0.9 and config.rollout.servers.engines == 8 and config.seed == 7
    assert config.lora.init == str(site.run_of(cell) / "adapter")
    assert config.data.student_template.startswith("Problem: ")  # what the checkpoint has learnt to read
    untrained = parse_config(["--data.train", "-", *site.evaluation(Cell(methods("8b")["untrained"], 0)).words[4:]])
    assert untrained.lora.init == "" and untrained.data.student_template == config.data.student_template


@pytest.mark.heavy
def test_the_launcher_understands_the_words(tmp_path):
    """Also in a job of several nodes, of which each runs cells of its own."""
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    site, cell = site_in(tmp_path, Site, gpus=8), Cell(methods("8b")["cl_egrsd"], 7)
    training = site.training(cell)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    exported = {"NNODES": "4", "SLURM_NODEID": "2", "LORA_RANK": "0", "STEPS": "7", "LR": "1"}
    environment = os.environ | {"PATH": path} | exported | training.variables
    done = subprocess.run(training.words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    launch, _, words = done.stdout.partition("-m\nmegatron_egrsd.cli\ntrain\n")
    config = parse_config(words.removesuffix("\n").split("\n"))
    assert launch.split("\n")[:4] == ["--nnodes", "1", "--node-rank", "0"]
    assert (config.objective.attenuation, config.objective.lookahead, config.dump_scores) == (1.0, 5, True)
    assert (config.output, config.seed, config.lora.export) == (str(site.run_of(cell)), 7, "adapter")
    assert config.checkpoint.resume == "auto" and config.data.evaluation == ""
    assert (config.lora.rank, config.steps, config.optimizer.lr) == (64, 100, 5e-6)  # what is exported changes none


def test_bad_arguments_are_refused_before_anything_runs(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    tiny = ["--model", f"8b={ROOT}/examples/tiny/model"]
    data = ["--data", str(ROOT / "examples/tiny/train.jsonl")]
    for words, reason in [
        (output, "no cell to run"),
        ([*output, *tiny, "--data", "no.jsonl"], "no training file"),
        ([*output, *tiny, *data, "--benchmarks", "no"], "no is no directory"),
        ([*output, "--model", "8b=no/model"], "no Hugging Face checkpoint of 8b"),
        ([*output, *tiny, "--cells", "nothing"], "no cell is called 'nothing'"),
    ]:
        assert main(words) == 2
        assert reason in (error := capsys.readouterr().err) and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_dry_run_counts_what_is_left(tmp_path):
    done = subprocess.run(["bash", ROOT / "examples/reproduce_paper.sh", "--dry-run", "--cells", "table5/*"],
                          env={**os.environ, "PYTHON": sys.executable, "OUTPUT": str(tmp_path)},
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 4b/")]
    assert len(rows) == 7 and all(row[1] == "to run" for row in rows)
    hours = {row[0].split("/")[1]: (row[2], float(row[4])) for row in rows}
    assert hours["untrained"][0] == "-" and 0 < hours["untrained"][1] < hours["sft"][1] < hours["egrsd"][1]
    assert "7 of 7 to run" in done.stdout and not list(tmp_path.iterdir())


# -- claims -----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_of_many_processes_one_gets_a_cell(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.reproduce_paper.claim import claimed\n"
        "with claimed(Path(sys.argv[1])) as claim:\n"
        "    print('held' if claim else 'taken', flush=True)\n    sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) for _ in range(6)]
    said = [process.stdout.readline().strip() for process in processes]
    assert sorted(said) == ["held", *["taken"] * 5]
    assert f"process {processes[said.index('held')].pid}" in claim.holder(tmp_path)
    for process in processes:
        process.communicate()
    assert claim.holder(tmp_path) == ""  # released


@pytest.mark.heavy
def test_a_claim_is_taken_over_from_the_dead_and_from_the_silent(tmp_path):
    code = "import os, sys; from benchmarks.reproduce_paper import claim; from pathlib import Path\n"
    code += "claim._take(Path(sys.argv[1])); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60)
    (left,) = tmp_path.glob("claim-*")
    assert not json.loads(left.read_text()).get("released") and claim.holder(tmp_path) == ""  # its process is gone
    with claim.claimed(tmp_path) as held:
        assert held and claim.holder(tmp_path)
        with claim.claimed(tmp_path) as second:
            assert second is None

    left.write_text(json.dumps({"host": "far", "machine": "another", "pid": 1, "started": "1"}))
    left = left.replace(tmp_path / "claim-000003.json")
    assert claim.holder(tmp_path) == "far, process 1"
    old = left.stat().st_mtime - claim.STALE - 1
    os.utime(left, (old, old))
    assert claim.holder(tmp_path) == ""


def test_a_claim_that_was_taken_over_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_BEAT", 0.01)
    with claim.claimed(tmp_path) as held:
        assert not held.lost.wait(0.1)
        (tmp_path / "claim-000002.json").write_text("{}")
        assert held.lost.wait(30)


# -- the schedule -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A reproduction of Table 2 that nothing disturbed, and its page."""
    site = site_in(tmp_path_factory.mktemp("whole"))
    outcome = run_all(TABLE_2, site)
    assert len(outcome.finished) == 7 and not (outcome.failed or outcome.stopped or outcome.elsewhere)
    write_page(site)
    return site


@pytest.mark.heavy
def test_an_interrupted_reproduction_ends_with_the_same_page(whole, tmp_path):
    site = site_in(tmp_path)
    ask(site, TABLE_2[2], "stop-train")
    ask(site, TABLE_2[4], "stop-between")
    ask(site, TABLE_2[5], "stop-evaluate")
    for finished in (2, 4, 5):
        outcome = run_all(TABLE_2, site)
        assert outcome.stopped and len(outcome.finished) == finished and not outcome.failed
        assert claim.holder(site.directory(TABLE_2[finished])) == ""
    write_page(site)
    assert "5 of 41" in (tmp_path / "page.html").read_text()
    outcome = run_all(TABLE_2, site)
    assert len(outcome.finished) == 7 and not outcome.stopped
    write_page(site)
    for name in ("page.html", "numbers.json"):
        assert (tmp_path / name).read_text() == (whole.output / name).read_text()


@pytest.mark.heavy
@pytest.mark.parametrize("place", ["fail-train", "fail-evaluate"])
def test_a_failing_cell_is_named_and_does_not_stop_the_others(whole, place, tmp_path, capsys):
    site, cell = site_in(tmp_path), TABLE_2[1]
    ask(site, cell, place)
    outcome = run_all(TABLE_2, site)
    assert len(outcome.finished) == 6 and list(outcome.failed) == [cell]
    log = site.directory(cell) / f"{place.removeprefix('fail-')}.log"
    assert outcome.failed[cell] == f"megatron-egrsd: error: made to fail (log {log})"
    assert f"{cell.key:32s} FAILED: megatron-egrsd: error: made to fail" in capsys.readouterr().out
    write_page(site)
    page = (tmp_path / "page.html").read_text()
    assert f"<b>4b/sft</b> failed: {outcome.failed[cell]}" in page and state(cell.setting, site).startswith("failed: ")
    assert run_all(TABLE_2, site).failed == {}  # the next attempt
    write_page(site)
    assert (tmp_path / "page.html").read_text() == (whole.output / "page.html").read_text()


def test_nothing_lives_on_of_a_process_that_takes_too_long_to_save(tmp_path, monkeypatch):
    """What a launcher starts in the background has a process group of its own."""
    monkeypatch.setattr("benchmarks.reproduce_paper.schedule._SAVING", 0.2)
    pid = tmp_path / "pid"
    script = f"set -m; trap '' TERM; sleep 300 & echo $! > {pid}; wait; wait"
    with pytest.raises(schedule.Stopped):
        schedule._call(Command(["bash", "-c", script], {}), tmp_path / "log", signal.SIGTERM, pid.is_file)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid.read_text())).wait(10)


def test_a_cell_of_another_node_is_left_to_it(tmp_path):
    site, cells = site_in(tmp_path), TABLE_2[:2]
    with claim.claimed(site.directory(cells[0])):
        outcome = run_all(cells, site)
        assert (outcome.elsewhere, outcome.finished) == ([cells[0]], [cells[1]])
        assert state(cells[0].setting, site).startswith("runs on ")
    assert run_all(cells, site).finished == cells


def test_a_cell_is_not_continued_with_other_words(whole, tmp_path):
    other = site_in(whole.output, train=("--steps", "3"))
    outcome = run_all(TABLE_2[:1], other)
    assert "begun with train [], not ['--steps', '3']" in outcome.failed[TABLE_2[0]]


# -- the numbers ------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_samples(whole):
    directory = whole.evaluation_of(TABLE_2[5])
    found = of_evaluation(directory)
    rows = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()[1:]]
    sets = dict.fromkeys(row["set"] for row in rows)
    accuracy = {s: 100 * np.mean([r["reward"] for r in rows if r["set"] == s]) for s in sets}
    length = np.mean([np.mean([r["tokens"] for r in rows if r["set"] == s]) for s in sets])
    for name, value in accuracy.items():
        assert found[name].value == pytest.approx(value)
    average = np.mean(list(accuracy.values()))
    expected = {"avg": average, "avg_len": length, "eff": average / (length / 1000)}
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value)
        assert found[name].low < value < found[name].high


def test_the_average_has_the_error_of_independent_sets(whole):
    """The bootstrap is as wide as the sets' standard errors say; with the same resamples for all it would be wider."""
    directory = whole.evaluation_of(TABLE_2[5])
    rows = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()[1:]]
    variance = 0.0
    for name in dict.fromkeys(row["set"] for row in rows):
        ids = dict.fromkeys(row["id"] for row in rows if row["set"] == name)
        shares = [100 * np.mean([r["reward"] for r in rows if r["set"] == name and r["id"] == i]) for i in ids]
        variance += np.var(shares) / len(shares) / 36
    found = of_evaluation(directory)["avg"]
    # The percentiles of 10,000 draws of a bounded sum of 27 terms; a normal one is 3.92 standard errors wide.
    assert (found.high - found.low) / np.sqrt(variance) == pytest.approx(3.92, rel=0.1)


def test_several_seeds_give_an_interval_over_seeds(whole, tmp_path):
    site, setting = site_in(tmp_path), methods("4b")["egrsd"]
    cells = [Cell(setting, seed) for seed in (1, 2, 3)]
    assert run_all(cells, site).finished == cells
    found, seeds = values_of(setting, site)
    values = [of_evaluation(site.evaluation_of(cell))["avg"].value for cell in cells]
    mean, half = np.mean(values), stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert seeds == 3 and found["avg"].value == pytest.approx(mean)
    assert (found["avg"].low, found["avg"].high) == pytest.approx((mean - half, mean + half))


def test_a_difference_has_our_interval():
    number = Number(Value(70.0, 66.0, 74.0), 75.0, 1)
    assert number.difference == Value(-5.0, -9.0, -1.0) and number.differs
    assert not Number(Value(70.0, 66.0, 76.0), 75.0, 1).differs
    assert Number(None, 75.0, 0).difference is None and Number(Value(1.0), None, 1).difference is None
    assert not Number(Value(70.0), 75.0, 1).differs  # one problem has no interval


def test_what_is_missing_is_shown_as_missing(whole):
    content = json.loads((whole.output / "numbers.json").read_text())
    for table in content.values():
        for row in table["rows"]:
            for number in row["numbers"].values():
                if row["setting"].startswith("4b/"):
                    assert row["state"] == "finished" and number["ours"]["value"] is not None
                else:
                    assert row["state"] == "not run" and number["ours"]["value"] is number["difference"] is None
    page = (whole.output / "page.html").read_text()
    assert page.count("not run</span>") == sum(len(t.rows) for t in TABLES if t.key not in ("table2", "table5"))
    assert "evaluated with evaluation.rollouts_per_problem = 1" in page
    assert 'id="frontier-4b"' in page and 'id="gradients-4b"' in page and 'id="frontier-8b"' not in page
