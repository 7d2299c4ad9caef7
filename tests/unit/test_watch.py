"""`watch` in a terminal: every state that a directory of a run can be in, from its files alone."""

import io
import math
import os
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import yaml
from rich.console import Console

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report.scored_dump import save_scores
from megatron_egrsd.system.files import is_locked, locked
from megatron_egrsd.watch import command
from megatron_egrsd.watch.braille import curve
from megatron_egrsd.watch.state import Reader, shade
from megatron_egrsd.watch.terminal import Picture
from tests.unit.test_report import make_run
from tests.unit.test_scores import batch

LENGTH = {"response/length": 80.0, "response/truncated": 0.75}


def configure(output, steps: int) -> None:
    settings = {"model": {"path": "m"}, "data": {"train": "d"}, "steps": steps}
    (output / "config.yaml").write_text(yaml.safe_dump(settings))


def shown(output, width: int = 120, colours: bool = False) -> str:
    system = "truecolor" if colours else None
    console = Console(file=io.StringIO(), width=width, height=50, force_terminal=colours, color_system=system)
    console.print(Picture(Reader(output).read(), live=False))
    return console.file.getvalue()


def age(output, seconds: float) -> None:
    for path in (output, *output.iterdir()):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_finished_run_is_shown_once(tmp_path, capsys):
    run = make_run(tmp_path / "mine", 3, **LENGTH)
    configure(run, 3)
    command.main([str(run)])
    out = capsys.readouterr().out
    assert "● finished" in out and "step 3/3" in out and "95.0% from 50.0%" in out and "last written" not in out
    assert "response length, tokens" in out and "3/3 ████████" in out
    assert "▲ 75% of the responses are cut off" in out
    assert "no sample: train with dump_scores true" in out and "\x1b" not in out


def test_the_lock_tells_that_a_run_goes_on(tmp_path):
    run = make_run(tmp_path / "mine", 3)
    configure(run, 9)
    age(run, 100_000)
    assert Reader(run).read().stage == "silent" and not is_locked(run)
    assert "last written 27h" in shown(run)  # 46 minutes, and the seconds that the test has taken
    with locked(run):
        assert is_locked(run) and Reader(run).read().stage == "running"
        assert "30s left" in shown(run)  # six steps of five seconds
        with pytest.raises(BadArgument, match="another run"), locked(run):  # watching has not taken the lock
            pass
    age(run, 10)
    assert Reader(run).read().stage == "running"  # perhaps on another machine


@pytest.mark.parametrize("width", [20, 40, 80, 120, 250])
def test_no_line_is_wider_than_the_terminal(width, tmp_path):
    run = make_run(tmp_path / "a-name-that-is-longer-than-a-narrow-terminal-is-wide", 60, **LENGTH)
    configure(run, 100)
    save_scores(batch(ObjectiveConfig()), run / "scores" / "step_000004.jsonl")
    assert max(map(len, shown(run, width).splitlines())) <= width


def test_an_empty_directory_waits_and_a_line_that_is_being_written_is_left_out(tmp_path):
    assert "● waiting" in shown(tmp_path) and "no step yet" in shown(tmp_path)
    reader = Reader(tmp_path)
    configure(tmp_path, 7)
    (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text()[:20])
    assert reader.read().total_steps == 0
    configure(tmp_path, 7)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n{"step": 2, "accu')
    state = reader.read()
    assert (state.step, state.total_steps) == (1, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('racy": null}\n')
    assert reader.read().step == 2 and "step 2/7" in shown(tmp_path)


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path):
    run = make_run(tmp_path / "run")
    reader = Reader(run)
    assert reader.read().run is reader.read().run


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text(""), "is a file"),
        (lambda p: (p / "x").mkdir(parents=True), "neither config.yaml nor metrics.jsonl$"),
        (lambda p: make_run(p / "mine"), "it holds the runs mine: give one"),
        (lambda p: p.mkdir() or (p / "metrics.jsonl").write_text("no\n"), "line 1 is not JSON"),
        (lambda p: p.mkdir() or (p / "metrics.jsonl").write_text('{"step": 1e999}\n'), "line 1 is not JSON"),
    ],
)
def test_what_is_no_run_is_one_sentence(make, reason, tmp_path):
    make(tmp_path / "there")
    with pytest.raises(BadArgument, match=reason):
        command.main([str(tmp_path / "there"), "--once"])


def test_options_are_checked(tmp_path):
    for words, reason in ((["--output", "x"], "--page"), (["--every", "0"], "0.5"), (["--every", "nan"], "0.5")):
        with pytest.raises(BadArgument, match=reason):
            command.main([str(tmp_path), *words])


def test_the_sample_is_coloured_by_its_weights_and_moves_no_cursor(tmp_path):
    run = make_run(tmp_path / "run")
    save_scores(batch(ObjectiveConfig(), text="so 1 + 1 = 2 \x1b[2J\r"), run / "scores" / "step_000002.jsonl")
    sample = Reader(run).read().sample
    assert sample.step == 4 and sample.advantage == 0.5 and set(map(np.sign, sample.shades)) == {1}
    out = shown(run, colours=True)
    assert "sample of step 4" in out and "advantage +0.500" in out and "48;2;0;" in out
    assert "\x1b[2J" not in out and "\r" not in out
    (run / "scores" / "step_000003.jsonl").write_text("{}\n")
    assert Reader(run).read().sample is None


def test_shades_are_those_of_the_token_page():
    assert [shade(w, 2.0) for w in (0.0, 0.01, -0.2, 0.21, 2.0, -9.0, math.nan)] == [0, 1, -1, 2, 10, -10, 0]


def dots(lines: list[str]) -> set[tuple[int, int]]:
    bits = {(0, 0): 1, (0, 1): 2, (0, 2): 4, (0, 3): 64, (1, 0): 8, (1, 1): 16, (1, 2): 32, (1, 3): 128}
    return {
        (2 * column + x, 4 * row + y)
        for row, line in enumerate(lines)
        for column, character in enumerate(line)
        for (x, y), bit in bits.items()
        if character != " " and ord(character) - 0x2800 & bit
    }


@pytest.mark.parametrize("count", [1, 2, 7, 40, 4000])
def test_a_curve_goes_through_its_values_without_a_hole(count):
    values = [math.sin(3 * i / count) for i in range(count)]
    found = dots(curve(values, 20, 4, -1.0, 1.0))
    columns = [[y for x, y in found if x == column] for column in range(40)]
    assert all(columns)
    for column, ys in enumerate(columns):
        assert max(ys) - min(ys) + 1 == len(ys)
        value = np.interp(column * (count - 1) / 39, range(count), values)
        assert min(abs((1 - (value + 1) / 2) * 15 - y) for y in ys) < 2
    for before, after in pairwise(columns):
        assert min(abs(a - b) for a in before for b in after) <= 1


def test_a_gap_in_the_values_is_a_gap_in_the_curve():
    values = [0.0] * 10 + [math.nan] * 10 + [1.0] * 20
    assert {x for x, _ in dots(curve(values, 20, 3, 0.0, 1.0))} == {*range(10), *range(20, 40)}


def test_a_run_whose_objective_is_a_users_own_is_shown(tmp_path):
    """Its file is gone; nothing of it is executed."""
    run = make_run(tmp_path / "run")
    own = ObjectiveConfig(function="gone.py:Mine")
    save_scores([replace(r, objective=own) for r in batch(ObjectiveConfig())], run / "scores" / "step_000001.jsonl")
    assert "sample of step 4" in shown(run)
