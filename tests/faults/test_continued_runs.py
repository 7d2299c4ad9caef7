"""A run is interrupted and continued with other settings; meanwhile a second run tries its output."""

import signal

import pytest

from tests.faults.runs import Run, replayed, rows, steps, write_replay
from tests.processes import kill


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_saves_and_a_resume_takes_new_settings(tmp_path):
    replay = write_replay(tmp_path / "replay", 1) / "step_000001.jsonl"
    output, settings = tmp_path / "run", replayed(replay) | {"checkpoint.every": 0, "optimizer.schedule": "cosine"}
    with Run(output, steps=3000, **settings) as run:
        run.await_step(2)
        with Run(output, steps=3000, **settings) as second:  # --resume auto on the same output
            assert second.finish() == 2 and "another run is writing" in second.last_word(), second.text()
        kill(run.ranks()[0], signal.SIGINT)
        assert run.finish(120) == 130 and "stopped by Ctrl-C; resumable: step" in run.last_word(), run.text()
    done = max(steps(output))
    assert [p.name for p in (output / "checkpoints").glob("step_*")] == [f"step_{done:06d}"]
    with Run(output, steps=done + 2, **settings, **{"optimizer.lr": 1e-5}) as again:
        assert again.finish() == 0, again.text()
        assert "optimizer.lr 0.0003 -> 1e-05" in again.text()
    assert steps(output) == list(range(1, done + 3))
    assert all(0 < row["optimizer/lr"] < 1e-5 for row in rows(output)[done:])
