"""Parts of a run that need neither ranks nor servers: the output directory and the stopwatch."""

import contextlib
import json
import os
import signal
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megatron_egrsd
from megatron_egrsd import train
from megatron_egrsd.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    SyncConfig,
)
from megatron_egrsd.data.dump_files import dump_path, dumps_in
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts
from megatron_egrsd.engine import build, checkpoint
from megatron_egrsd.errors import BadArgument, Interrupted, Preempted, RunError
from megatron_egrsd.learn import rollout_metrics
from megatron_egrsd.planning.machines import machine_of
from megatron_egrsd.rollout.scratch import SHARED_LIST
from megatron_egrsd.run import agreement, guard
from megatron_egrsd.run.checkpoints import is_best
from megatron_egrsd.run.health import Health
from megatron_egrsd.run.offline_rollouts import check_replay
from megatron_egrsd.run.preemption import Preemption
from megatron_egrsd.run.resuming import changed_settings, check_frozen
from megatron_egrsd.run.rollout_source import LiveRollouts
from megatron_egrsd.run.run_directory import RunDirectory
from megatron_egrsd.run.session import Session
from megatron_egrsd.run.stopwatch import Stopwatch
from megatron_egrsd.run.throughput import known_peak, throughput
from megatron_egrsd.sampling.batches import Batch


def _config(output: Path, **changes) -> Config:
    return Config(ModelConfig("m"), DataConfig(train="d"), output=str(output), **changes)


def test_outputs_after_the_checkpoint_are_renamed_and_none_is_deleted(tmp_path):
    directory = RunDirectory(_config(tmp_path))
    kept = [directory.dump(kind, step) for kind in ("rollouts", "scores", "skipped") for step in (1, 2)]
    kept += [tmp_path / "frontier.png"]
    stale = [directory.dump(kind, step) for kind in ("rollouts", "scores", "skipped") for step in (3, 10)]
    stale += [tmp_path / "metrics.jsonl", tmp_path / "logs" / "sglang-0.log", tmp_path / "hf" / "config.json"]
    stale += [tmp_path / "logs" / "node-1" / "sglang-0.log"]
    kept += [directory.checkpoints / f"step_{step:06d}" / "metadata.json" for step in (1, 2)]
    stale += [directory.checkpoints / f"step_{step:06d}" / "metadata.json" for step in (3, 4)]
    for path in (*kept, *stale):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    directory.move_stale_outputs(2)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in stale)
    renamed = [p for p in tmp_path.rglob("*") if p.is_file() and p not in kept]
    assert sorted(p.read_text() for p in renamed) == sorted(p.name for p in stale)
    assert [checkpoint.step_of(path) for path in checkpoint.complete(directory.checkpoints)] == [2, 1]


def test_dumps_are_found_by_step_and_other_files_are_not(tmp_path):
    for step in (1_000_000, 20, 3):
        dump_path(tmp_path, step).touch()
    for name in ("step_000001.jsonl.before-5", "step_1.json", "step_first.jsonl", "metrics.jsonl"):
        (tmp_path / name).touch()
    found = dumps_in(tmp_path)
    assert [path.name for path in found.values()] == ["step_000003.jsonl", "step_000020.jsonl", "step_1000000.jsonl"]
    assert list(found) == [3, 20, 1_000_000] and dumps_in(tmp_path / "missing") == {}


@pytest.mark.parametrize("best", [1, 3])
def test_the_name_of_the_best_checkpoint_goes_with_it(best, tmp_path):
    """Or the resumed run's checkpoint of that step would be kept as the best, whatever its evaluation."""
    directory = RunDirectory(_config(tmp_path))
    for step in (1, 2, 3):
        (directory.checkpoints / f"step_{step:06d}").mkdir(parents=True)
    (directory.checkpoints / "best").write_text(f"step_{best:06d}")
    directory.move_stale_outputs(2)
    assert (directory.checkpoints / "best").exists() == (best == 1)


def test_a_resumed_run_has_the_metrics_up_to_its_checkpoint(tmp_path):
    directory, resumed = RunDirectory(_config(tmp_path / "run")), tmp_path / "step_000002"
    assert directory.begin(None).steps == []
    resumed.mkdir()
    (resumed / "metrics.jsonl").write_text(
        '{"step": 1, "accuracy": 0.5}\n{"step": 2, "accuracy": null}\n{"step": 2, "evaluation/accuracy": 0.25}\n'
    )
    before = directory.begin(resumed)
    assert before.steps == [{"step": 1, "accuracy": 0.5}, {"step": 2, "accuracy": None}]
    assert before.evaluations == [{"step": 2, "accuracy": 0.25}]
    assert directory.metrics.read_text() == (resumed / "metrics.jsonl").read_text()
    assert directory.begin(tmp_path / "of_version_0.1.0").evaluations == []


@pytest.mark.parametrize(
    ("lora", "exports"),
    [
        (LoraConfig(), ["hf"]),
        (LoraConfig(rank=4), ["hf", "adapter"]),
        (LoraConfig(rank=4, export="adapter"), ["adapter"]),
        (LoraConfig(rank=4, export="merged"), ["hf"]),
    ],
)
def test_a_run_killed_between_its_last_step_and_its_export_is_resumed(lora, exports, tmp_path, monkeypatch):
    last = tmp_path / "checkpoints" / "step_000003"
    monkeypatch.setattr("megatron_egrsd.engine.checkpoint.find", lambda *_: last)
    settings = {"steps": 3, "checkpoint": CheckpointConfig(resume="auto"), "lora": lora, "output": str(tmp_path)}
    directory = RunDirectory(Config(ModelConfig("m"), DataConfig(train="d"), **settings))
    for name in exports:
        assert directory.checkpoint_to_resume() == last
        (tmp_path / name).mkdir()
    with pytest.raises(BadArgument, match="is the end of a run of 3 steps"):
        directory.checkpoint_to_resume()


@pytest.mark.parametrize(
    ("begin", "every", "at_start", "evaluated"),
    [
        (4, 0, False, [4]),
        (2, 2, False, [2]),
        (1, 2, False, []),
        (1, 2, True, [1]),
        (0, 2, False, []),
        (0, 2, True, [0]),
    ],
)
def test_a_resumed_run_makes_the_evaluation_in_which_it_was_stopped(begin, every, at_start, evaluated, monkeypatch):
    calls = {"evaluate": [], "finish": []}

    class Resumed:
        checkpoints = SimpleNamespace(publish=lambda wait: None)

        def resume(self):
            return begin

        def evaluate(self, heldout, step):
            calls["evaluate"].append(step)

        def check_preemption(self):
            raise RunError("far enough")

        def stopped(self, error, step):
            return error

        def finish(self):
            calls["finish"].append(begin)

    preemption = SimpleNamespace(save_on_interrupt=lambda: None)
    monkeypatch.setattr(train, "prepare", lambda _: ([], [], None))
    monkeypatch.setattr(train, "facts", lambda *_: {})
    monkeypatch.setattr(train, "build_engine", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(train, "Preemption", lambda: contextlib.nullcontext(preemption))
    monkeypatch.setattr(train, "open_session", lambda *_: contextlib.nullcontext(Resumed()))
    evaluation = EvaluationConfig(every=every, at_start=at_start)
    with contextlib.suppress(RunError):
        train.main(_config("run", steps=4, evaluation=evaluation, rollout=RolloutConfig(sync=SyncConfig("disk"))))
    assert calls == {"evaluate": evaluated, "finish": [4] if begin == 4 else []}


def test_a_start_that_is_refused_at_the_end_of_a_run_clears_what_its_killed_servers_left(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_egrsd.engine.checkpoint.find", lambda *_: tmp_path / "checkpoints" / "step_000003")
    settings = {"steps": 3, "checkpoint": CheckpointConfig(resume="auto"), "output": str(tmp_path)}
    directory = RunDirectory(Config(ModelConfig("m"), DataConfig(train="d"), **settings))
    directory.model.mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # short, as the names of sockets need it
        monkeypatch.setattr(tempfile, "tempdir", place)
        number, memory = tempfile.mkstemp(dir="/dev/shm")
        os.close(number)
        left = Path(place) / "megatron-egrsd-killed"
        left.mkdir()
        (left / SHARED_LIST).write_text(f"{Path(memory).name}\n")
        with pytest.raises(BadArgument, match="is the end of a run of 3 steps"):
            directory.checkpoint_to_resume()
        assert not left.exists() and not Path(memory).exists()


def test_warnings_after_a_resume_compare_with_the_first_steps_of_the_run(tmp_path):
    config, resumed = _config(tmp_path / "run"), tmp_path / "step_000003"
    resumed.mkdir()
    rows = [{"step": step, "response/length": 100.0} for step in (1, 2, 3)]
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = SimpleNamespace(config=config, directory=RunDirectory(config), resumed=resumed, health=Health(config))
    Session._open_log(session)
    session.log.close()
    (warning,) = session.health.warnings(4, {"response/length": 400.0})
    assert "three times those of the first steps" in warning


def test_a_replay_has_a_file_for_every_step_that_is_left(tmp_path):
    config = _config(tmp_path / "run", steps=4, debug="train-only", replay=str(tmp_path))
    for step in (2, 3):
        (tmp_path / f"step_{step:06d}.jsonl").touch()
    check_replay(replace(config, steps=3), 1)
    check_replay(replace(config, replay=str(tmp_path / "step_000002.jsonl")), 0)
    with pytest.raises(BadArgument, match=r"has no step_000004\.jsonl, but the run has 4 steps; lower steps"):
        check_replay(config, 1)
    with pytest.raises(BadArgument, match=r"has no step_000001\.jsonl"):
        check_replay(config, 0)


@pytest.mark.parametrize(
    ("accuracies", "best"), [([], False), ([0.5, 0.4], False), ([0.4, 0.5], True), ([0.5, 0.4, 0.5], True)]
)
def test_the_best_checkpoint_is_that_of_the_last_evaluation_if_none_was_more_accurate(accuracies, best):
    evaluations = [{"step": 2 * i, "accuracy": accuracy} for i, accuracy in enumerate(accuracies)]
    last = 2 * len(accuracies) - 2
    assert is_best(evaluations, last) is best
    assert not is_best(evaluations, last + 1)  # which was not evaluated


def _rollout(reward: float, tokens: int, finish_reason: str = "stop", version: int = 0, error: str = "") -> Rollout:
    prompt = Prompt(Problem("p", "p", "a"), [1, 2], [1, 2, 3])
    return Rollout(prompt, 0, [1] * tokens, [0.0] * tokens, finish_reason, version, "", reward, error)


def test_rollouts_of_weights_that_are_too_old_are_refused():
    """Under staleness 0, those of any but the engine's version."""
    for version in (3, 2):
        batch = Batch([_rollout(1.0, 3, version=3), _rollout(1.0, 3, version=version)], 2)
        phases = []
        source = SimpleNamespace(
            config=Config(ModelConfig("m"), DataConfig(train="d")),
            batches=SimpleNamespace(batch=lambda prompts, step, batch=batch: batch),
            placement=SimpleNamespace(enter=phases.append),
            _with_servers=lambda sample, version: sample(),
        )
        if version == 3:
            assert LiveRollouts.batch(source, [], 3) is batch and phases == ["training"]
        else:
            with pytest.raises(RunError, match="weight version 2, but the engine holds version 3"):
                LiveRollouts.batch(source, [], 3)
            assert not phases


def test_the_metrics_of_three_rollouts_by_hand():
    rollouts = [_rollout(1.0, 3), _rollout(0.5, 5), _rollout(0.0, 4, "length", error="the reward took too long")]
    assert rollout_metrics(rollouts, [1.25, 0.5, 0.0], [0.0, 0.0, -0.5]) == {
        "reward/mean": 0.5,
        "reward/shaped": pytest.approx(1.75 / 3),
        "reward/failed": 1,
        "accuracy": pytest.approx(1 / 3),
        "response/length": 4,
        "response/truncated": pytest.approx(1 / 3),
        "batch/tokens": 12,
        "batch/degenerate_share": pytest.approx(2 / 3),
    }


def test_updates_that_are_skipped_in_a_row_end_the_run_and_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "on_first_rank", lambda function: function())
    config = _config(tmp_path, max_skipped_steps=1)
    checks, rollouts = guard.UpdateGuard(config, RunDirectory(config)), [_rollout(1.0, 3)]
    skipped, applied = {"skipped/loss": 1.0}, {"optimizer/skipped": 0.0}
    kept = tmp_path / "skipped" / "step_000001.jsonl"
    sentence = f"step 1 skips an update: the loss is not finite; its rollouts are in {kept}"
    assert checks.check(1, rollouts, skipped) == sentence
    assert checks.check(2, rollouts, applied) == ""
    assert checks.check(3, rollouts, skipped).startswith("step 3 skips an update")
    with pytest.raises(RunError, match=r"step 4 skips an update.*; 2 in a row are too many \(max_skipped_steps\)"):
        checks.check(4, rollouts, skipped)
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == [f"step_{n:06d}.jsonl" for n in (1, 3, 4)]
    assert load_rollouts(tmp_path / "skipped" / "step_000004.jsonl") == rollouts


def test_the_stopwatch_adds_up_by_name():
    watch = Stopwatch()
    with watch("whole"):
        for _ in range(2):
            with watch("part"):
                time.sleep(0.01)
    assert list(watch.seconds) == ["part", "whole"]
    assert 0.02 <= watch.seconds["part"] <= watch.seconds["whole"]


def test_the_utilisation_is_reported_where_the_peak_of_the_device_is_known(monkeypatch):
    metrics = {"batch/tokens": 600.0, "time/step": 30.0, "time/score": 1.5, "time/train": 2.5, "perf/model_flops": 4e15}
    assert throughput(metrics, 0.0) == {"perf/tokens_per_second": 20.0}
    assert throughput(metrics, 4e15) == {"perf/tokens_per_second": 20.0, "perf/mfu": 0.25}

    config = Config(ModelConfig("m", dtype="bfloat16"), DataConfig(train="d"))
    assert known_peak(config) == 0  # no GPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "16")
    names = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA H20": 148e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA B200": 2250e12, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 0,
        "Tesla V100-SXM2-32GB": 0, "NVIDIA RTX A1000": 0,
    }  # fmt: skip
    assert [name for name in names if machine_of(name)] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]  # as measured
    for name, peak in names.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        assert known_peak(config) == 16 * peak
        assert known_peak(replace(config, model=ModelConfig("m", dtype="float32"))) == 0


def stopped(preemption: Preemption, error: type[Exception]) -> None:
    deadline = time.monotonic() + 30
    with pytest.raises(error):
        while time.monotonic() < deadline:
            preemption.check()
            time.sleep(0.01)


def test_the_first_ctrl_c_stops_the_run_as_sigterm_does_and_the_second_ends_it(capsys):
    with Preemption() as preemption, pytest.raises(KeyboardInterrupt):  # nothing to save yet
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    with Preemption() as preemption:
        preemption.save_on_interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        stopped(preemption, Interrupted)
        assert "Ctrl-C again ends at once" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with Preemption() as preemption:
        preemption.save_on_interrupt()
        os.kill(os.getpid(), signal.SIGTERM)
        stopped(preemption, Preempted)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)])
def test_a_signal_counts_while_an_event_loop_has_the_interpreters_pipe(number, error):
    """As uvloop has it while a loop runs: a run went on, though it had said that it was interrupted."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with Preemption() as preemption:
        preemption.save_on_interrupt()
        before = signal.set_wakeup_fd(writer)
        os.kill(os.getpid(), number)
        assert os.read(reader, 1) == bytes([number])
        signal.set_wakeup_fd(before)
        stopped(preemption, error)
    os.close(reader)
    os.close(writer)


def test_a_rank_that_is_lost_while_the_engine_is_built_is_a_sentence(monkeypatch):
    config = Config(ModelConfig("m"), DataConfig(train="d"))

    def lost(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 10000ms for send operation")

    monkeypatch.setattr(build, "Engine", lost)
    with pytest.raises(RunError, match=r"rank 0 on .* lost contact to another rank.*Timed out waiting"):
        build.build_engine(config, needs_teacher=False)
    monkeypatch.setattr(build, "Engine", lambda *_, **__: torch.empty(1).reshape(2))
    with pytest.raises(RuntimeError, match="shape") as found:
        build.build_engine(config, needs_teacher=False)
    assert not isinstance(found.value, RunError)


def test_the_facts_of_a_run_do_not_need_the_packages_own_path(monkeypatch):
    """From the folder above a clone called megatron_egrsd the package is a namespace, whose __file__ is None."""
    config = Config(ModelConfig("m"), DataConfig(train="d"))
    expected = agreement.facts(config, [])
    monkeypatch.setattr(megatron_egrsd, "__file__", None)
    assert agreement.facts(config, []) == expected


def test_ranks_with_another_version_of_the_package_notice(tmp_path, monkeypatch):
    config = Config(ModelConfig("m"), DataConfig(train="d"))
    assert agreement._PACKAGE.name == "megatron_egrsd" and (agreement._PACKAGE / "learn.py").exists()
    monkeypatch.setattr(agreement, "_PACKAGE", tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("x = 1\n")
    before = agreement.facts(config, [])
    (tmp_path / "room" / "a.py").write_text("x = 2\n")
    changed = agreement.facts(config, [])
    assert {name for name in before if before[name] != changed[name]} == {"code"}


def test_routers_that_were_frozen_stay_so_at_a_resume():
    trained = Config(ModelConfig("m"), DataConfig(train="d"))
    frozen = replace(trained, optimizer=OptimizerConfig(freeze_router=True))
    check_frozen(Path("step_1"), {"config": asdict(trained)}, frozen)
    check_frozen(Path("step_1"), {}, trained)  # of an older version
    with pytest.raises(BadArgument, match=r"step_1 is of a run with optimizer\.freeze_router.*continue with the same"):
        check_frozen(Path("step_1"), {"config": asdict(frozen)}, trained)


def test_changed_settings_are_named():
    before = Config(ModelConfig("m"), DataConfig(train="d"), output="a", steps=2)
    now = replace(before, output="b", steps=4, optimizer=OptimizerConfig(lr=1e-5))
    assert changed_settings(asdict(before), asdict(now)) == ["optimizer.lr 1e-06 -> 1e-05", "steps 2 -> 4"]
    assert changed_settings({}, asdict(now)) == []
