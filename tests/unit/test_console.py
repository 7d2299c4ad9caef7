"""The line a step, metrics.jsonl, TensorBoard, and the page made from the same table."""

import io
import json
import math
from pathlib import Path

from rich.console import Console

from megatron_egrsd.run.log import RunLog
from megatron_egrsd.run.metrics import METRICS, metrics_page

STEP = {m.key: 0.5 for m in METRICS if not m.key.startswith("evaluation/")}


def test_a_pipe_gets_one_aligned_line_a_step_without_control_codes(tmp_path):
    out = io.StringIO()
    log = RunLog(tmp_path, total_steps=120, tensorboard=False, file=out)
    log.step({"step": 1, **STEP})
    log.step({"step": 60, **STEP, "response/length": 8192.0, "optimizer/grad_norm": 1234.5, "gate/mean": math.nan})
    log.step({"step": 120, "reward/mean": 1})  # a metric that is not there is a dash
    log.message("saved [model]")
    log.close()
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and len(lines) == 5
    assert len({len(line) for line in lines[:4]}) == 1
    header = lines[0].split()
    for label in ("reward", "acc", "len", "H_T", "gate", "clip", "|grad|", "dlogp", "tok/s", "gen", "sync"):
        assert label in header
    assert lines[2].startswith(" 60/120 ████░░░░") and "30s" in lines[2] and "nan" in lines[2]
    assert lines[3].startswith("120/120 ████████") and lines[3].endswith("-")
    assert lines[4] == "saved [model]"


def test_a_narrow_terminal_leaves_columns_out(tmp_path, monkeypatch):
    out = io.StringIO()
    make = Console
    monkeypatch.setattr(
        "megatron_egrsd.run.log.Console",
        lambda **kw: make(force_terminal=True, width=80, color_system=None, **kw),
    )
    log = RunLog(tmp_path, total_steps=10, tensorboard=False, file=out)
    for step in range(1, 11):
        log.step({"step": step, **STEP})
    log.close()
    assert max(map(len, out.getvalue().splitlines())) <= 80 and "reward" in out.getvalue()


def test_jsonl_is_json_whatever_the_numbers(tmp_path):
    log = RunLog(tmp_path, 2, tensorboard=False, file=io.StringIO())
    log.evaluation(0, {"accuracy": 0.25, "length/mean": 88.5, "k": 8})
    log.step({"step": 1, "loss/policy": math.nan, "optimizer/grad_norm": math.inf, "batch/tokens": 7, "new": 1.5})
    rows = [json.loads(line, parse_constant=None) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 0, "evaluation/accuracy": 0.25, "evaluation/length/mean": 88.5, "evaluation/k": 8}
    assert rows[1] == {"step": 1, "loss/policy": None, "optimizer/grad_norm": None, "batch/tokens": 7, "new": 1.5}
    log.close()


def test_tensorboard_holds_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 2, file=io.StringIO())
    log.step({"step": 1, "reward/mean": 0.25})
    log.step({"step": 2, "reward/mean": 0.75})
    log.evaluation(2, {"accuracy": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]
    assert events.Scalars("evaluation/accuracy")[0].value == 0.5


def test_the_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
    assert page.read_text() == metrics_page(), "run: python -m megatron_egrsd.run.metrics > docs/reference/metrics.md"
    assert len({m.key for m in METRICS}) == len(METRICS)
