"""Training ranks are killed, frozen and told to stop; their disk fills up. Rollouts are replayed, so that a run that
was stopped and continued can be compared bit for bit with one that never was."""

import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
from safetensors.torch import load_file

from tests.faults.runs import Run, numbers, replayed, rows, steps, write_replay
from tests.processes import kill

STEPS = 12


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    return write_replay(tmp_path_factory.mktemp("replay"), STEPS)


@pytest.fixture(scope="module")
def undisturbed(replay, tmp_path_factory):
    """The output of a run without faults."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with Run(output, steps=STEPS, **replayed(replay)) as run:
        assert run.finish() == 0, run.text()
    assert steps(output) == list(range(1, STEPS + 1))
    return output


def assert_same(output, expected) -> None:
    assert numbers(output) == numbers(expected)
    got, want = (load_file(path / "hf" / "model.safetensors") for path in (output, expected))
    assert got.keys() == want.keys() and all(got[k].equal(want[k]) for k in want)
    assert not list((output / "checkpoints").glob("*.partial"))


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_happened(replay, undisturbed, tmp_path):
    output = tmp_path / "run"
    with Run(output, steps=STEPS, **replayed(replay)) as run:
        run.await_step(4)
        kill(run.ranks()[0], signal.SIGTERM)
        assert run.finish(60) == 0, run.text()
        assert "stopped by SIGTERM; resumable: step" in run.last_word() and "--resume auto" in run.last_word()
    assert 4 <= max(steps(output)) < STEPS
    with Run(output, steps=STEPS, **replayed(replay)) as run:
        assert run.finish() == 0, run.text()
    assert_same(output, undisturbed)


def _await_partial_checkpoint(run: Run) -> None:
    """Wait until a checkpoint is being written, or the run has ended."""
    deadline = time.monotonic() + 120
    while run.process.poll() is None and not list((run.output / "checkpoints").glob("step_*.partial")):
        assert time.monotonic() < deadline, run.text()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_killed_and_stopped_while_a_checkpoint_is_written_in_the_background(replay, undisturbed, tmp_path):
    output, settings = tmp_path / "run", replayed(replay) | {"checkpoint.asynchronous": "true"}
    with Run(output, steps=STEPS, **settings) as run:
        run.await_step(3)
        _await_partial_checkpoint(run)
        for process in run.all():
            kill(process)
        run.finish(20)
    killed = max(steps(output))
    with Run(output, steps=STEPS, **settings) as run:
        run.await_step(killed + 2)
        _await_partial_checkpoint(run)
        kill(run.ranks()[0], signal.SIGTERM)
        assert run.finish(60) == 0 and "resumable: step" in run.last_word(), run.text()
    assert killed < max(steps(output)) < STEPS
    with Run(output, steps=STEPS, **settings) as run:
        assert run.finish() == 0, run.text()
    assert_same(output, undisturbed)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_a_run_killed_between_its_last_checkpoint_and_its_export_is_finished(replay, undisturbed, tmp_path):
    output = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(output / "hf")
    with Run(output, steps=STEPS, **replayed(replay)) as run:
        assert run.finish() == 0, run.text()
    assert_same(output, undisturbed)
    with Run(output, steps=STEPS, **replayed(replay)) as run:
        assert run.finish() == 2 and "is the end of a run" in run.last_word(), run.text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("nothing_left")
def test_killed_at_five_random_moments_equals_the_run_that_never_was(replay, chance, tmp_path):
    """SIGKILL, at any moment: while it starts, in a step, while it writes a checkpoint."""
    # Far more steps than five starts of a second and a half reach; all of them train on the same batch.
    output, whole = tmp_path / "run", tmp_path / "whole"
    settings = replayed(replay / "step_000001.jsonl") | {"steps": 80}
    with Run(whole, **settings) as run:
        assert run.finish() == 0, run.text()
    for number in range(5):
        with Run(output, **settings) as run:
            before = max(steps(output), default=0)
            run.await_step(before + 1) if chance.random() < 0.8 else time.sleep(chance.uniform(0, 8))
            time.sleep(chance.uniform(0, 1.5))
            assert run.process.poll() is None, run.text()
            for process in run.all():
                kill(process)
            run.finish(20)
        print(f"kill {number}: after step {max(steps(output), default=0)}")
    with Run(output, **settings) as run:
        assert run.finish() == 0, run.text()
    assert_same(output, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "layout", [{"parallel.tensor": 2}, {"parallel.distributed_optimizer": "true"}], ids=["TP2", "DP2"]
)
def test_a_killed_rank_ends_the_others_and_torchrun_continues(layout, replay, chance, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with Run(whole, ranks=2, steps=STEPS, **replayed(replay), **layout) as run:
        assert run.finish() == 0, run.text()
    with Run(parts, ranks=2, restarts=2, steps=STEPS, **replayed(replay), **layout) as run:
        for step in (1, 5):
            run.await_step(step)
            time.sleep(chance.uniform(0, 0.3))
            victims = run.ranks()
            kill(chance.choice(victims))
            deadline = time.monotonic() + 60
            while any(v.is_running() and v.status() != "zombie" for v in victims):  # the other one as well
                assert time.monotonic() < deadline, run.text()
                time.sleep(0.1)
        assert run.finish() == 0, run.text()
        assert (
            run.log.read_text(errors="replace").count("(exitcode: -9)") == 2
        )  # torchrun names the one that was killed
    assert_same(parts, whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_of_one_rank_stops_all_of_them(rank, replay, tmp_path):
    with Run(
        tmp_path / "run", ranks=2, steps=500, **replayed(replay / "step_000001.jsonl"), **{"parallel.tensor": 2}
    ) as run:
        run.await_step(2)
        kill(run.ranks()[rank], signal.SIGTERM)
        assert run.finish(90) == 0, run.text()
        assert "resumable" in run.last_word()


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("nothing_left")
def test_a_rank_whose_torchrun_was_interrupted_while_it_started_ranks_ends_with_a_sentence(replay, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # where the store was
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(closed.getsockname()[1]), "RANK": "1",
                       "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        settings = replayed(replay) | {"parallel.tensor": 2}
        with Run(tmp_path / "run", environment=environment, steps=STEPS, **settings) as run:
            assert run.finish(60) == 1, run.text()  # parallel.timeout is two hours
            assert "rank 1 ends: its torchrun" in run.last_word(), run.text()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("nothing_left")
def test_a_frozen_rank_is_noticed_within_the_timeout(replay, tmp_path):
    settings = {**replayed(replay / "step_000001.jsonl"), "parallel.tensor": 2, "parallel.timeout": 15}
    with Run(tmp_path / "run", ranks=2, steps=500, **settings) as run:
        run.await_step(2)
        frozen = run.ranks()[1]
        kill(frozen, signal.SIGSTOP)
        started = time.monotonic()
        while "lost contact to another rank" not in run.log.read_text(errors="replace"):
            assert time.monotonic() - started < 60, run.text()
            time.sleep(0.2)
        assert run.finish(90) == 1, run.text()  # torchrun ends the frozen one with SIGKILL
        assert not frozen.is_running() or frozen.status() == "zombie"
    complete = [p for p in (tmp_path / "run" / "checkpoints").glob("step_*") if p.suffix != ".partial"]
    assert complete and all((p / "integrity.json").is_file() for p in complete)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a tmpfs takes root")
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", directory], check=True, timeout=20)
    yield directory
    subprocess.run(["umount", directory], check=True, timeout=20)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("ranks", "asynchronous"), [(1, "false"), (2, "false"), (2, "true")], ids=["1", "2", "2 asynchronous"]
)
def test_a_full_disk_ends_the_run_with_its_checkpoints_intact(ranks, asynchronous, replay, small_disk, tmp_path):
    """One checkpoint is about 4 MB: the third finds no room."""
    output = small_disk / "run"
    layout = {"parallel.tensor": ranks, "checkpoint.asynchronous": asynchronous}
    with Run(output, ranks=ranks, steps=STEPS, **replayed(replay), **layout, **{"checkpoint.keep": 9}) as run:
        run.log = tmp_path / "log"  # the disk is full
        assert run.finish() == 1
    last = max(steps(output))
    complete = sorted(p.name for p in (output / "checkpoints").glob("step_*") if p.suffix != ".partial")
    assert complete and last < STEPS
    for left in (output / "checkpoints").glob("*.partial"):
        shutil.rmtree(left)
    # With room again (the oldest checkpoint gone), the run goes on.
    saved = shutil.copytree(output, tmp_path / "roomy")
    with Run(saved, ranks=ranks, steps=last + 1, **replayed(replay), **layout) as run:
        assert run.finish() == 0, run.text()
    assert [row["step"] for row in rows(saved)] == list(range(1, last + 2))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_damaged_checkpoint_is_passed_over(replay, undisturbed, chance, tmp_path):
    output = tmp_path / "run"
    with Run(output, steps=6, **replayed(replay)) as run:
        assert run.finish() == 0, run.text()
    file = chance.choice(sorted((output / "checkpoints" / "step_000006").glob("*.distcp")))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    file.write_bytes(content)
    with Run(output, steps=STEPS, **replayed(replay)) as run:
        assert run.finish() == 0, run.text()
        assert "step_000006 is damaged" in run.text() and "continuing from" in run.text()
    assert_same(output, undisturbed)
