"""Weights & Biases: every metric of metrics.jsonl is in the offline files under its name, over two starts of a run."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_egrsd.config import Config, DataConfig, LoggingConfig, ModelConfig, WandbConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.run.log import RunLog
from megatron_egrsd.run.metrics import METRICS
from tests.ranks import run_ranks

MODEL = Path(__file__).parents[2] / "examples" / "tiny" / "model"


def config(output, mode: str = "offline", model: str = "m") -> Config:
    logging = LoggingConfig(WandbConfig("tiny", mode=mode))
    return Config(ModelConfig(model), DataConfig(train="d"), output=str(output), logging=logging)


def test_a_missing_package_is_one_sentence_before_anything_starts(tmp_path, monkeypatch):
    """A directory wandb/ of earlier runs, which Python takes for a namespace, is not the package."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "wandb").is_dir())])
    for _ in range(2):
        with pytest.raises(BadArgument, match=r"package wandb, which is not installed: pip install wandb"):
            prepare(config(tmp_path / "run", model=str(MODEL)))
        (tmp_path / "wandb").mkdir(exist_ok=True)
    assert not (tmp_path / "run").exists()


def test_a_missing_key_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(BadArgument, match="no key of Weights & Biases: run `wandb login`"):
        prepare(config(tmp_path / "run", mode="online", model=str(MODEL)))


def test_a_service_that_has_ended_fails_no_run_that_is_finished(tmp_path, monkeypatch):
    def ended(*_, **__):
        raise ConnectionResetError("connection lost")

    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=lambda _: None, finish=ended)
    fake = SimpleNamespace(Settings=lambda **_: None, init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    file = io.StringIO()
    RunLog(tmp_path, 1, tensorboard=False, file=file, config=config(tmp_path)).close()
    assert "did not take the last metrics: connection lost" in file.getvalue()
    run.define_metric = ended
    with pytest.raises(RunError, match=r"cannot open the run .*: connection lost"):
        RunLog(tmp_path, 1, tensorboard=False, file=file, config=config(tmp_path))


def records(path: Path) -> list[dict]:
    """Return the rows of a file of wandb: LevelDB's log format, a protocol buffer a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = path.read_bytes(), 7, b"", []  # behind the file's header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block ends in zeros if no header fits
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def start(rank: int, world_size: int, output: str, first: int, last: int) -> None:
    log = RunLog(Path(output), last, tensorboard=False, file=io.StringIO(), config=config(output))
    for step in range(first, last + 1):
        numbers = {m.key: step + 0.25 for m in METRICS if not m.key.startswith("evaluation/")}
        log.step({"step": step} | numbers | {"student/entropy": math.nan, "batch/tokens": 7})
        log.evaluation(step, {m.key.removeprefix("evaluation/"): 0.5 for m in METRICS if m.key.startswith("eval")})
    log.close()


@pytest.mark.heavy
def test_the_offline_files_hold_every_metric_under_its_name(tmp_path, monkeypatch):
    """Two processes, as a run that is resumed: step 3 comes again."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    for first, last in ((1, 3), (3, 4)):
        run_ranks(start, 1, str(tmp_path), first, last, timeout=200)
    found = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    name = (tmp_path / "wandb" / "run_id").read_text()
    assert len(found) == 2 and {path.stem for path in found} == {f"run-{name}"}
    rows = [row for path in found for row in records(path)]
    expected = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(expected) == 10
    for got, want in zip(rows, expected, strict=True):
        got = {key: number for key, number in got.items() if not key.startswith("_")}
        assert got.keys() == want.keys()
        assert {k: None if isinstance(n, str) or math.isnan(n) else n for k, n in got.items()} == want
