"""`evaluate` on the tiny model through a real SGLang server: it repeats itself, interrupted or not."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_egrsd.config import ModelConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.evaluation.evaluate import evaluate
from megatron_egrsd.hf.convert import ToMegatron
from megatron_egrsd.rollout.servers import RolloutServers

from .conftest import START_TIMEOUT, servers_config, wait_until

TINY = Path(__file__).parents[2] / "examples/tiny"
PROBLEMS, K = 24, 4

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A deterministic server with the tiny model."""
    config = servers_config(
        max_total_tokens=65536, max_concurrent_requests=128, args={"enable_deterministic_inference": True}
    )
    logs = tmp_path_factory.mktemp("logs")
    with RolloutServers(config, ModelConfig(str(TINY / "model"), "float32"), 0, logs, key="") as servers:
        yield servers.urls[0]


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    lines = (TINY / "heldout.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:PROBLEMS]))
    return path


def words(problems: Path, output: Path, *more: str) -> list[str]:
    options = {
        "data.train": "-",
        "evaluation.benchmarks.sets": json.dumps([str(problems)]),
        "model.path": str(TINY / "model"),
        "model.dtype": "float32",
        "rollout.max_response_tokens": "240",
        "rollout.servers.start_timeout": str(START_TIMEOUT),
        "evaluation.rollouts_per_problem": str(K),
        "output": str(output),
    }
    return [word for key, value in options.items() for word in (f"--{key}", value)] + list(more)


def attached(url: str) -> list[str]:
    return ["--rollout.servers.urls", json.dumps([url])]


def rows(output: Path) -> dict:
    lines = (output / "samples.jsonl").read_text().splitlines()[1:]
    return {(r["set"], r["id"], r["index"]): r for r in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole(url, problems, tmp_path_factory) -> Path:
    """An evaluation without interruption."""
    output = tmp_path_factory.mktemp("whole")
    evaluate(parse_config(words(problems, output, *attached(url))))
    return output


def numbers(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["sets"]


def test_a_second_evaluation_gives_the_same_samples_and_scores(url, problems, whole, tmp_path):
    # Fewer requests at a time: other batches, the same samples.
    evaluate(parse_config(words(problems, tmp_path, *attached(url), "--rollout.servers.max_concurrent_requests", "7")))
    assert rows(tmp_path) == rows(whole) and len(rows(whole)) == PROBLEMS * K
    assert numbers(tmp_path) == numbers(whole)
    few = numbers(whole)["few"]
    assert 0.1 < few["accuracy"]["value"] < 0.9  # 45 % on all problems
    assert few["accuracy"]["low"] < few["accuracy"]["value"] < few["accuracy"]["high"]
    assert few["pass@4"]["value"] > few["pass@2"]["value"] > few["accuracy"]["value"]
    assert few["thinking/mean"]["value"] + few["answer/mean"]["value"] == pytest.approx(few["length/mean"]["value"])
    texts = {(r["id"], r["response"]) for r in rows(whole).values()}
    assert len(texts) > 0.9 * PROBLEMS * K  # the samples of one problem differ


def test_another_seed_gives_other_samples(url, problems, whole, tmp_path):
    evaluate(parse_config(words(problems, tmp_path, *attached(url), "--seed", "1")))
    same = sum(rows(tmp_path)[key]["response"] == row["response"] for key, row in rows(whole).items())
    assert same < 0.1 * PROBLEMS * K


def test_killed_and_resumed_it_gives_the_same_table(url, problems, whole, tmp_path, capsys):
    command = [sys.executable, "-m", "megatron_egrsd.cli", "evaluate", *words(problems, tmp_path, *attached(url))]
    command += ["--rollout.servers.max_concurrent_requests", "2"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    file = tmp_path / "samples.jsonl"
    try:
        assert wait_until(lambda: file.is_file() and file.read_bytes().count(b"\n") > 10, 200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    time.sleep(0.5)
    written = file.read_bytes()
    assert written.count(b"\n") - 1 < PROBLEMS * K  # it was interrupted
    torn = written[: written.rstrip(b"\n").rfind(b"\n") + 40]  # the last line breaks off
    file.write_bytes(torn)

    evaluate(parse_config(words(problems, tmp_path, *attached(url))))
    assert rows(tmp_path) == rows(whole) and numbers(tmp_path) == numbers(whole)
    table = capsys.readouterr().out
    evaluate(
        parse_config(words(problems, tmp_path, "--rollout.servers.urls", '["http://127.0.0.1:9"]'))
    )  # needs no server
    assert capsys.readouterr().out.splitlines() == table.splitlines()[1:]
    evaluate(parse_config(words(problems, tmp_path, *attached(url), "--evaluation.rollouts_per_problem", "2")))
    assert numbers(tmp_path)["few"]["k"] == 2


def test_samples_of_other_settings_are_refused(url, problems, whole, tmp_path):
    for key, value in (("evaluation.temperature", "0.5"), ("seed", "3"), ("rollout.max_response_tokens", "200")):
        with pytest.raises(BadArgument, match=rf"sampled with {key} = .* choose another output"):
            evaluate(parse_config(words(problems, whole, *attached(url), f"--{key}", value)))
    other = tmp_path / problems.name
    other.write_text(problems.read_text().replace('"answer": "', '"answer": "1', 1))
    with pytest.raises(BadArgument, match="samples of another problem"):
        evaluate(parse_config(words(other, whole, *attached(url))))


@pytest.mark.slow
def test_a_server_that_is_not_deterministic_is_refused(servers, problems, tmp_path):
    with pytest.raises(BadArgument, match=r"evaluation\.benchmarks\.deterministic false"):
        evaluate(parse_config(words(problems, tmp_path, *attached(servers.urls[0]))))


@pytest.mark.slow
def test_a_megatron_checkpoint_through_the_command_gives_what_the_original_gives(problems, whole, tmp_path):
    ToMegatron(TINY / "model", tmp_path / "megatron").run()
    output = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_egrsd.cli", "evaluate", f"few={problems}"]
    options = words(problems, output, "--model.path", str(tmp_path / "megatron"))
    at = options.index("--evaluation.benchmarks.sets")
    options[at : at + 2] = ["--rollout.servers.max_total_tokens", "65536"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "converting" in done.stdout and "accuracy (avg@k)" in done.stdout
    assert not list(output.glob(".hf-*"))
    assert rows(output) == rows(whole)
