"""Whole runs, SGLang included, that suffer faults again and again until they are complete."""

import os
import signal
import time

import pytest

from megatron_egrsd.data.samples import load_rollouts
from tests.faults.runs import PER_PROMPT, PROMPTS, Run, rows, steps
from tests.processes import kill

KINDS = (
    "kill scheduler",
    "kill server",
    "freeze scheduler",
    "terminate",
    "kill trainer",
    "kill trainer, damage checkpoint",
)
SETTINGS = {"dump_rollouts": "true", "rollout.servers.health_timeout": 25, "rollout.sync.verify": "true"}


def strike(run: Run, kind: str) -> None:
    trainer = run.ranks()[0]
    if "scheduler" in kind or "server" in kind:
        word = "scheduler" if "scheduler" in kind else "rollout.launch"
        for process in run.find(word)[:1]:
            kill(process, signal.SIGSTOP if kind.startswith("freeze") else signal.SIGKILL)
    else:
        kill(trainer, signal.SIGTERM if kind == "terminate" else signal.SIGKILL)


def damage_newest_checkpoint(run: Run, chance) -> None:
    newest = max((run.output / "checkpoints").glob("step_??????"), default=None)
    if newest is None:
        return
    file = chance.choice(sorted(p for p in newest.iterdir() if p.is_file() and p.name != "metrics.jsonl"))
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def assert_whole(output, total: int) -> None:
    """Check that every step exists once, with a whole batch from the weights of its step."""
    assert steps(output) == list(range(1, total + 1))
    for step in range(1, total + 1):
        rollouts = load_rollouts(output / "rollouts" / f"step_{step:06d}.jsonl")
        assert [r.group for r in rollouts] == [g for g in range(PROMPTS) for _ in range(PER_PROMPT)]
        assert {r.weight_version for r in rollouts} == {step - 1}
    assert all(row["sync/log_prob_difference"] < 1e-5 for row in rows(output) if "loss/policy" in row)
    assert (output / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("nothing_left")
def test_runs_survive_whatever_happens(chance, tmp_path):
    """Each trial strikes once at a random moment; what ends the run must leave it resumable, and is resumed."""
    output, trials = tmp_path / "run", int(os.environ.get("FAULT_TRIALS", "8"))
    total = 6 * trials  # more than are made between the strikes
    for number in range(trials):
        kind = KINDS[number % len(KINDS)]
        with Run(output, steps=total, **SETTINGS) as run:
            before = max(steps(output), default=0)
            # A server that dies before it has served at all ends the run: its settings are wrong.
            run.await_step(before + max(chance.randrange(2), "scheduler" in kind or "server" in kind))
            time.sleep(chance.uniform(0, 3))
            strike(run, kind)
            started, struck_at = time.monotonic(), max(steps(output), default=0)
            if "trainer" in kind or kind == "terminate":
                status = run.finish(120)
                assert status == (0 if kind == "terminate" else -signal.SIGKILL), run.text()
                assert kind != "terminate" or "resumable" in run.last_word()
                outcome = "stopped, resumable"
            else:
                run.await_step(struck_at + 1, timeout=240)
                assert run.process.poll() in (None, 0), run.text()
                kill(run.ranks()[0], signal.SIGTERM) if run.process.poll() is None else None
                assert run.finish(120) == 0, run.text()
                outcome = "carried on"
        print(f"trial {number}: {kind} after step {struck_at}: {outcome} in {time.monotonic() - started:.0f} s")
        if "damage" in kind:
            damage_newest_checkpoint(run, chance)
    with Run(output, steps=total, **SETTINGS) as run:
        assert run.finish(600) == 0, run.text()
    assert_whole(output, total)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("nothing_left")
def test_too_many_lost_servers_end_the_run_with_a_checkpoint(tmp_path):
    output = tmp_path / "run"
    with Run(output, steps=50, **SETTINGS, **{"rollout.servers.max_restarts": 0, "checkpoint.every": 0}) as run:
        run.await_step(2)
        strike(run, "kill server")
        assert run.finish(60) == 1
        word = run.last_word()
    assert "the run gives up after 0 lost servers (rollout.servers.max_restarts); resumable: step" in word
    last = max(steps(output))
    with Run(output, steps=last + 1, **SETTINGS) as run:
        assert run.finish() == 0, run.text()
    assert_whole(output, last + 1)
