"""Commands, exit statuses and the one line on stderr."""

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import pytest

from megatron_egrsd import cli
from megatron_egrsd.config_reader import valid_keys
from megatron_egrsd.errors import BadArgument, RunError

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--model.path", "m", "--data.train", "t.jsonl"]


@pytest.fixture
def train(monkeypatch):
    """A stand-in for megatron_egrsd.train that records its calls."""
    calls = []
    module = types.ModuleType("megatron_egrsd.train")
    module.main = lambda config: calls.append(("main", config))
    module.calls = calls
    monkeypatch.setitem(sys.modules, "megatron_egrsd.train", module)
    monkeypatch.setattr("megatron_egrsd.train", module, raising=False)
    monkeypatch.setattr("megatron_egrsd.planning.plan.print_plan", lambda config, **_: calls.append(("plan", config)))
    return module


def test_train_and_dry_run(train):
    assert cli.main([*TRAIN, "--steps", "3"]) == 0
    assert cli.main([*TRAIN, "--dry-run"]) == 0
    assert [name for name, _ in train.calls] == ["main", "plan"]
    assert train.calls[0][1].steps == 3


@pytest.mark.parametrize("words", [["--resume", "auto"], ["--resume=auto"], ["--checkpoint.resume=auto"]])
def test_resume_is_short_for_its_key(words, train):
    assert cli.main([*TRAIN, *words]) == 0
    assert train.calls[0][1].checkpoint.resume == "auto"


@pytest.mark.parametrize("other", [ValueError("could not determine the shape"), RuntimeError("x"), OSError("y")])
def test_a_ctrl_c_of_which_a_library_makes_another_exception_is_one(other, train, capsys):
    def interrupted(config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise other from None

    def fails(config):
        raise other

    train.main = interrupted
    assert cli.main(TRAIN) == 130
    assert capsys.readouterr().err == "megatron-egrsd: error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train.main = fails
    with pytest.raises(type(other)):
        cli.main(TRAIN)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BadArgument("no such\nmodel"), 2, "megatron-egrsd: error: no such model\n"),
        (RunError("the server died"), 1, "megatron-egrsd: error: the server died\n"),
        (KeyboardInterrupt(), 130, "megatron-egrsd: error: interrupted\n"),
        (ModuleNotFoundError("x", name="sglang"), 1, "megatron-egrsd: error: the package sglang is not installed"),
    ],
)
def test_errors_are_one_line_with_their_status(train, capsys, monkeypatch, error, status, line):
    def fail(config):
        raise error

    train.main = fail
    assert cli.main(TRAIN) == status
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)  # torchrun ends it here, once the node's first rank has ended
    assert cli.main(TRAIN) == status
    assert waited and capsys.readouterr().err == err


def test_a_bug_keeps_its_traceback(train):
    def fail(config):
        raise ZeroDivisionError

    train.main = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(TRAIN)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean train?"),
        (["quux"], "see megatron-egrsd --help"),
        (["train", "--stepz", "1"], "did you mean steps?"),
        (["report"], "report takes the directories"),
        (["report", "/no/such/run"], "metrics.jsonl"),
        (["doctor", "now"], "no arguments"),
        (["train", "--resumed=auto"], "no configuration key is called resumed"),
        (["plan", "--gpus", "8", "--rollouts", "-8"], "--rollouts: '-8' is not a positive whole number"),
        (["plan", "--rollouts", "0"], "--rollouts: '0' is not a positive whole number"),
        (["plan", "--longest", "-2000"], "--longest: '-2000' is not a positive whole number"),
    ],
)
def test_mistakes(capsys, arguments, words):
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_help(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command}" in out for command in cli.COMMANDS)
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--dry-run" in out
    for key in valid_keys():
        assert f"--{key}" in out
    assert "Tokens the gate looks ahead" in " ".join(out.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_answered_at_once(command):
    code = f"from megatron_egrsd.cli import main; status = main(['{command}', '--help'])"
    code += "; import sys; print(status, {'torch', 'transformers', 'sglang'} & set(sys.modules))"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    seconds = time.monotonic() - started
    text, _, last = done.stdout.rstrip().rpartition("\n")
    assert f"megatron-egrsd {command}" in text and last == "0 set()", done.stdout
    assert seconds < 5, f"{seconds:.1f} s"


MISTAKES = {
    "train": ["--stepz", "1"],
    "evaluate": ["aime24"],
    "report": [],
    "prepare-data": ["x.jsonl"],
    "convert": ["to-hf"],
    "plan": ["--gpus", "7"],
    "doctor": ["now"],
    "watch": ["nothing"],
}


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.heavy
def test_a_mistake_is_one_sentence_by_the_script_and_by_the_module(command, tmp_path):
    """In each command, from a directory outside the checkout, without PYTHONPATH if it is installed."""
    script = shutil.which("megatron-egrsd", path=os.path.dirname(sys.executable))
    ways = [[sys.executable, "-m", "megatron_egrsd"], [sys.executable, "-m", "megatron_egrsd.cli"]]
    ways += [[script]] if script else []
    ways = ways if command == "plan" else ways[:1]  # which command it is makes no difference to the ways
    done = [
        subprocess.run([*way, command, *MISTAKES[command]], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        for way in ways
    ]
    assert done[0].returncode == 2 and done[0].stdout == "" and done[0].stderr.count("\n") == 1, done[0].stderr
    assert all((d.returncode, d.stdout, d.stderr) == (2, "", done[0].stderr) for d in done)


@pytest.mark.parametrize(
    ("tool", "name", "command"),
    [("convert_hf.py", "convert_hf", "convert"), ("prepare_data.py", "prepare_data", "prepare-data"),
     ("plan.py", "plan.py", "plan")],
)  # fmt: skip
def test_older_names_are_the_same_commands(tool, name, command, tmp_path, capsys):
    words = [sys.executable, ROOT / "tools" / tool, *MISTAKES[command]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert cli.main([command, *MISTAKES[command]]) == done.returncode == 2
    assert (done.stdout, done.stderr) == ("", capsys.readouterr().err.replace("megatron-egrsd", name, 1))


def test_doctor_names_every_piece_and_its_cost(capsys, monkeypatch):
    from megatron_egrsd import doctor

    status = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert all(piece.name in out for piece in doctor.PIECES)
    assert status == int("MISSING" in out)

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    assert {name.partition("[")[0] for name in needed} <= {piece.name for piece in doctor.PIECES}

    def broken():
        raise OSError("bad library")

    pieces = [
        doctor.Piece("a", lambda: "1.0", "x"),
        doctor.Piece("b", lambda: None, "no b things"),
        doctor.Piece("c", broken, "no c things", required=True),
    ]
    monkeypatch.setattr(doctor, "PIECES", pieces)
    assert doctor.run_doctor() == 1
    out = capsys.readouterr().out
    assert "no b things" in out and "bad library" in out and "install c" in out


@pytest.mark.parametrize(
    ("why_not", "cuda", "found"), [("not built", False, None), ("", False, "CPU"), ("", True, "CPU and CUDA")]
)
def test_doctor_tells_which_kernels_were_built(why_not, cuda, found, monkeypatch):
    from megatron_egrsd import doctor
    from megatron_egrsd.vocab_parallel import kernels

    monkeypatch.setattr(kernels, "WHY_NOT", why_not)
    monkeypatch.setattr(kernels, "HAS_CUDA", cuda)
    assert next(piece for piece in doctor.PIECES if piece.name == "our kernels").version() == found


@pytest.mark.heavy
def test_transformer_engine_that_cannot_be_loaded_is_named(tmp_path):
    """megatron-core imports it wherever it is installed."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('cudnn shared object not found.')")
    command = [sys.executable, "-m", "megatron_egrsd.cli", "train", "--model.path", "m", "--data.train", "t"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "transformer-engine is installed but cannot be loaded (cudnn shared object not found.)" in done.stderr
