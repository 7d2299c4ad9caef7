"""Every preset as a user runs it: live, dumped, looked at, replayed, stopped and resumed if nothing else shows that."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.objectives.presets import presets
from megatron_egrsd.report import command
from megatron_egrsd.rollout.servers import RolloutServers
from tests.end_to_end.test_train import CONFIG, ROOT, metrics, run

RESUMED = {"cl_egrsd", "opsd", "rlcsd", "srpo", "antisd", "sft"}  # in tests/parallel, each of them
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    config = parse_config(["--config", str(ROOT / CONFIG), "--model.path", str(ROOT / "examples/tiny/model")])
    logs = tmp_path_factory.mktemp("servers")
    with RolloutServers(config.rollout.servers, config.model, 0, logs, key="") as servers:
        yield json.dumps(servers.urls)


def settings(preset: str) -> dict[str, object]:
    """Sixteen responses a step, in groups if the preset compares groups."""
    grouped = presets()[preset]["rollout.rollouts_per_prompt"] > 1
    return {
        "objective.preset": preset,
        "rollout.prompts_per_step": 4 if grouped else 16,
        "rollout.rollouts_per_prompt": 4 if grouped else 1,
        "evaluation.at_start": "false",
        "evaluation.every": 0,
        "steps": 2,
    }


def trained(output: Path):
    return load_file(output / "hf" / "model.safetensors")


@pytest.mark.parametrize("preset", presets())
def test_live_page_replay_and_resume(preset, urls, tmp_path):
    live, replay, resumed = (tmp_path / name for name in ("live", "replay", "resumed"))
    done = run(live, **settings(preset), **{"rollout.servers.urls": urls})
    assert done.returncode == 0, done.stderr[-3000:]

    command.main(["--tokens", str(live)])
    page = (live / "tokens_step_000002.html").read_text()
    # The page offers the recorded objective with and without its gate; RLSD has none, and others none of its weights.
    shown = {"rlsd": "gate_off"} | dict.fromkeys(("opsd", "crisp", "rlcsd", "sdpo", "srpo", "sft", "antisd"), "run")
    assert f'value="{shown.get(preset, preset)}" checked' in page

    replayed = settings(preset) | {"debug": "train-only", "replay": live / "rollouts"}
    done = run(replay, **replayed)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = trained(replay)
    assert all(expected[name].equal(weight) for name, weight in trained(live).items())

    outputs = [live, replay]
    if preset not in RESUMED:
        outputs.append(resumed)
        for steps in (1, 2):
            done = run(resumed, **(replayed | {"steps": steps}), **{"checkpoint.every": 1, "checkpoint.resume": "auto"})
            assert done.returncode == 0, done.stderr[-3000:]
        assert all(expected[name].equal(weight) for name, weight in trained(resumed).items())
    losses = [[m["loss/policy"] for m in metrics(output) if "loss/policy" in m] for output in outputs]
    assert all(found == losses[0] for found in losses) and losses[0]  # a step whose groups are all wrong trains nothing
