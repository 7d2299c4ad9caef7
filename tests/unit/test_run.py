"""Parts of a run that need neither ranks nor servers: the output directory and the stopwatch."""

import time

from megatron_egrsd.config import Config, DataConfig, ModelConfig
from megatron_egrsd.run.run_directory import RunDirectory
from megatron_egrsd.run.stopwatch import Stopwatch


def test_outputs_after_the_checkpoint_are_renamed_and_none_is_deleted(tmp_path):
    directory = RunDirectory(Config(ModelConfig("m"), DataConfig(train="d"), output=str(tmp_path)))
    kept = [directory.dump(kind, step) for kind in ("rollouts", "scores", "skipped") for step in (1, 2)]
    kept += [tmp_path / "frontier.png"]
    stale = [directory.dump(kind, step) for kind in ("rollouts", "scores", "skipped") for step in (3, 10)]
    stale += [tmp_path / "metrics.jsonl", tmp_path / "logs" / "sglang-0.log", tmp_path / "hf" / "config.json"]
    for path in (*kept, *stale):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    directory.move_stale_outputs(2)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in stale)
    renamed = [p for p in tmp_path.rglob("*") if p.is_file() and p not in kept]
    assert sorted(p.read_text() for p in renamed) == sorted(p.name for p in stale)


def test_the_stopwatch_adds_up_by_name():
    watch = Stopwatch()
    with watch("whole"):
        for _ in range(2):
            with watch("part"):
                time.sleep(0.01)
    assert list(watch.seconds) == ["part", "whole"]
    assert 0.02 <= watch.seconds["part"] <= watch.seconds["whole"]
