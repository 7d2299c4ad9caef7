"""Engine and SGLang take turns on one device. Real servers, real ranks, real faults; on CPU SGLang frees nothing."""

import pytest

from megatron_egrsd.config_reader import parse_config
from tests.end_to_end.test_train import descendants_with, metrics, run
from tests.faults.runs import MODEL, ROOT, survive
from tests.processes import kill
from tests.ranks import run_ranks
from tests.training import open_engine

COLOCATED = {
    "rollout.servers.colocated": "true",
    "rollout.sync.transport": "ipc",
    "rollout.sync.verify": "true",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("transport", "parallel"), [("ipc", "tensor"), ("disk", "context")])
def test_the_engine_is_away_while_sglang_samples(transport, parallel, tmp_path):
    """With evaluations and checkpoints between the phases, every weight arrives and every log-prob agrees."""
    settings = COLOCATED | {
        "rollout.sync.transport": transport,
        "rollout.servers.engines": 2,
        f"parallel.{parallel}": 2,
    }
    settings |= {"parallel.distributed_optimizer": "true", "teacher.weights": "ema", "objective.kl_coef": 0.01}
    settings |= {"checkpoint.every": 2, "evaluation.every": 2, "optimizer.updates_per_batch": 2}
    done = run(tmp_path / "run", ranks=2, timeout=500, steps=4, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(tmp_path / "run")
    assert [m["step"] for m in rows if "evaluation/accuracy" in m] == [0, 2, 4]
    trained = [m for m in rows if "loss/policy" in m]
    assert len(trained) == 4 and all(m["sync/log_prob_difference"] < 1e-5 for m in trained)
    assert (tmp_path / "run/hf/model.safetensors").exists()
    assert not descendants_with(str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faults_end_or_continue(tmp_path):
    """Two ranks; the only server is killed, then SIGTERM, then too many lost servers, then the end."""
    output = tmp_path / "run"
    survive(output, COLOCATED)
    assert not descendants_with(str(tmp_path))


def _kill_in_every_phase(rank, world_size, config) -> list[tuple[str, float]]:
    """Return (phase in which the server was killed, difference of the log-probs sampled after it)."""
    from megatron_egrsd.learn import learn
    from megatron_egrsd.planning.preflight import prepare
    from megatron_egrsd.run.preemption import Preemption
    from megatron_egrsd.run.session import open_session
    from megatron_egrsd.run.stopwatch import Stopwatch

    prompts, _, tokenizer = prepare(config)
    seen = []
    with (
        open_engine(config) as engine,
        Preemption() as preemption,
        open_session(config, engine, tokenizer, preemption) as session,
    ):
        servers = session.rollouts.fleet.servers

        def step(number: int) -> float:
            rollouts = session.rollouts.batch(prompts, number).rollouts
            metrics, _ = learn(engine, rollouts, config, history=session.history)
            return metrics["sync/log_prob_difference"]

        assert step(0) < 1e-5  # afterwards the phase is training
        kill(servers.servers[0].process)
        session.rollouts.push_weights(1, Stopwatch())
        seen.append(("training", step(1)))
        session.rollouts.placement.enter("transfer")
        kill(servers.servers[0].process)
        session.rollouts.push_weights(2, Stopwatch())
        kill(servers.servers[0].process)
        seen.append(("transfer, sampling", step(2)))
        kill(servers.servers[0].process)
        path = session.save(3)  # needs the device, which the servers that start again would take
        assert path.is_dir()
        seen.append(("training, saved", step(3)))
    return seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_is_killed_in_every_phase(tmp_path):
    words = ["--config", str(ROOT / "examples/configs/tiny_cpu.yaml"), "--model.path", str(MODEL)]
    words += ["--data.train", str(ROOT / "examples/tiny/train.jsonl"), "--output", str(tmp_path / "run")]
    words += ["--rollout.prompts_per_step", "4", "--rollout.rollouts_per_prompt", "4", "--steps", "9"]
    config = parse_config(words + [word for key, value in COLOCATED.items() for word in (f"--{key}", value)])
    [seen] = run_ranks(_kill_in_every_phase, 1, config, timeout=500)
    assert len(seen) == 3 and all(difference < 1e-5 for _, difference in seen), seen
