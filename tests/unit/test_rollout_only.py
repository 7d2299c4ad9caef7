"""`debug: rollout-only` with responses from a list: servers that are lost come back, and the log ends with the run."""

import json
from pathlib import Path

import pytest

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import load_rollouts
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.rollout.servers import RolloutServers, ServersLost
from megatron_egrsd.run import rollout_only as module
from megatron_egrsd.watch.state import Reader
from tests.unit.test_sampling import Responses

ROOT = Path(__file__).parents[2]


class Servers(RolloutServers):
    """Servers of the user, which are healthy as soon as somebody waits for them."""

    def await_health(self, servers=None):
        pass

    def _replace_routers(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs three steps of two prompts with two responses each, and other settings if any.

    Its argument is called before each response, with the number of responses so far and the servers.
    """
    settings = {
        "model.path": ROOT / "examples/tiny/model",
        "data.train": ROOT / "examples/tiny/train.jsonl",
        "output": tmp_path / "run",
        "debug": "rollout-only",
        "steps": 3,
        "rollout.max_response_tokens": 32,
        "rollout.prompts_per_step": 2,
        "rollout.rollouts_per_prompt": 2,
        "rollout.servers.urls": '["http://a:1", "http://b:1"]',
    }
    monkeypatch.setattr(module, "RolloutServers", Servers)

    def start(meanwhile=lambda number, servers: None, **more) -> Path:
        config = parse_config([word for k, v in (settings | more).items() for word in (f"--{k}", str(v))])
        numbers = iter(range(100))
        client = lambda servers, *_: Responses(lambda _: meanwhile(next(numbers), servers))  # noqa: E731
        monkeypatch.setattr(module, "RolloutClient", client)
        prompts, _, tokenizer = prepare(config)
        module.rollout_only(config, prompts, tokenizer)
        return tmp_path / "run"

    return start


def test_servers_that_are_lost_are_used_again(run):
    live = []

    def meanwhile(number, servers):
        live.append(len(servers.live))
        if number == 2:  # in the first step, which the other server finishes
            servers.mark_lost(servers.servers[:1], "a hangs")
        if number == 6:  # in the second
            servers.mark_all_lost("both hang")
            raise ServersLost("both hang")

    output = run(meanwhile)
    assert live == [2, 2, 2, 1, *[2] * 9]  # one response was asked for twice
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for step in (1, 2, 3):
        rollouts = load_rollouts(output / "rollouts" / f"step_{step:06d}.jsonl")
        assert [(r.group, r.response_ids) for r in rollouts] == [(0, [0]), (0, [1]), (1, [10]), (1, [11])]


def test_groups_without_a_signal_are_replaced(run):
    """All responses are wrong."""
    output = run(**{"objective.advantage": "group", "rollout.dynamic_sampling": 2})
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(row["batch/sampled"], row["batch/degenerate_share"]) for row in rows] == [(12, 1.0)] * 3
    first, second = (load_rollouts(output / f"rollouts/step_00000{step}.jsonl") for step in (1, 2))
    assert {r.prompt.problem.id for r in first}.isdisjoint(r.prompt.problem.id for r in second)


def test_its_directory_can_be_watched(run):
    state = Reader(run()).read()
    assert (state.stage, state.step, state.total_steps) == ("finished", 3, 3)


def test_the_log_is_closed_after_an_error(run, monkeypatch):
    closed = []
    monkeypatch.setattr(module.RunLog, "close", lambda log: closed.append(log.lines))

    def meanwhile(number, servers):
        if number == 4:
            raise RunError("refused")

    with pytest.raises(RunError, match="refused"):
        run(meanwhile)
    assert closed == [1]


def test_servers_return_the_routes_that_training_will_replay(tmp_path, monkeypatch):
    def servers(settings, *_):
        raise RunError(json.dumps(settings.args))

    monkeypatch.setattr(module, "RolloutServers", servers)
    words = {"model.path": ROOT / "examples/tiny/model", "data.train": "-", "output": tmp_path / "run"}
    words |= {"debug": "rollout-only", "rollout.routing_replay": "true"}
    config = parse_config([word for key, value in words.items() for word in (f"--{key}", str(value))])
    with pytest.raises(RunError, match=r'\{"enable_return_routed_experts": true\}'):
        module.rollout_only(config, [], None)


def test_it_does_not_resume(tmp_path):
    words = {"model.path": ROOT / "examples/tiny/model", "data.train": "-", "output": tmp_path}
    words |= {"debug": "rollout-only", "checkpoint.resume": "auto"}
    config = parse_config([word for key, value in words.items() for word in (f"--{key}", str(value))])
    with pytest.raises(BadArgument, match="rollout-only saves no checkpoints to continue from"):
        prepare(config)
