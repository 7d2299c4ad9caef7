"""The validation study's runner with a real server and training processes: two steps, and a run that cannot work."""

from pathlib import Path

import pytest

from benchmarks.validate_method import run
from benchmarks.validate_method.__main__ import main
from benchmarks.validate_method.hypotheses import FAMILY, Setting
from benchmarks.validate_method.record import read_record

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_runs_are_made_and_one_that_fails_is_named(tmp_path, monkeypatch, capsys):
    small = ("--rollout.prompts_per_step", "8", "--rollout.max_response_tokens", "60",
             "--evaluation.rollouts_per_problem", "1")  # fmt: skip
    works = [Setting(f"tiny/{name}", 1, FAMILY[name] + small) for name in ("grpo", "egrsd")]
    broken = Setting("tiny/broken", 1, ("--data.train", "none.jsonl"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "settings", lambda own="": [*works, broken])
    monkeypatch.setattr(run, "STEPS", 2)
    words = ["run", "--output", str(tmp_path), "--lanes", "1"]
    assert main(words) == 1
    (failed,) = capsys.readouterr().err.splitlines()
    assert failed.startswith("failed: tiny/broken, seed 0: ") and "none.jsonl" in failed
    for setting in works:
        path = run.path_of(tmp_path, setting, 0)
        assert run.is_complete(path) and read_record(path)["ended"] > read_record(path)["began"]
    assert list(run.path_of(tmp_path, works[1], 0).glob("scores/step_*.jsonl"))  # DUMPED
    monkeypatch.setattr(run, "settings", lambda own="": works)
    assert main(words) == 0 and "2 runs, 0 to make" in capsys.readouterr().out
