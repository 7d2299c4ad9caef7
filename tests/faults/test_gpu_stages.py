"""tools/gpu/runner.py with stages of a line each: order, limits, files, resumption; crashes and hangs stop no other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import is_running
from tools.gpu.results import read

ROOT = Path(__file__).parents[2]
# A run of the stages in STAGES (name, seconds, code), each a Python process.
RUN = """
import json, sys
from pathlib import Path
from tools.gpu import runner
from tools.gpu.runner import Stage, run
runner.GRACE = 1.0
stages = [Stage(name, seconds, (sys.executable, "-c", code)) for name, seconds, code in json.loads(sys.argv[1])]
sys.exit(not run(stages, Path(sys.argv[2]), float(sys.argv[3]), {"device": "a test"}, again=len(sys.argv) > 4))
"""
ROW = "from tools.gpu.results import record; record('table', value=%d)\n"
HANG = "import time; time.sleep(600)\n"


def _command(stages, directory, seconds, *again):
    return [sys.executable, "-c", RUN, json.dumps(stages), str(directory), str(seconds), *again]


def _run(stages, directory, seconds=120, *again, complete=True):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(_command(stages, directory, seconds, *again), cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=150)  # fmt: skip
    assert done.returncode == (not complete), done.stderr
    return [line.partition(":")[0] for line in done.stdout.splitlines()]


def _states(directory):
    return {path.stem: read(directory, path.stem)["state"] for path in directory.glob("*.json")}


@pytest.mark.heavy
def test_a_crash_and_a_hang_stop_no_other_stage_and_a_second_call_runs_only_what_is_not_done(tmp_path):
    flag = tmp_path / "mended"
    stages = [
        ("first", 60, ROW % 1),
        ("raises", 60, ROW % 2 + f"import os; assert os.path.exists({str(flag)!r})"),
        ("dies", 60, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        # It ignores SIGTERM, and its child has left its session.
        ("hangs", 10, ROW % 3 + "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
         f"child = subprocess.Popen([sys.executable, '-c', {HANG!r}], start_new_session=True)\n"
         f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n" + HANG),
        ("lacks", 60, "from tools.gpu.results import absent; absent('no such part')"),
        ("last", 60, ROW % 4 + "import sys; print('said', repr(sys.stdin.read()))"),
    ]  # fmt: skip
    results = tmp_path / "results"
    names = [name for name, *_ in stages]
    assert _run(stages, results, complete=False) == names
    states = dict(zip(names, ["done", "failed", "failed", "timed out", "absent", "done"], strict=True))
    assert _states(results) == states
    values = {name: [row["value"] for row in read(results, name)["rows"]] for name in names}
    assert values == {"first": [1], "raises": [2], "dies": [], "hangs": [3], "lacks": [], "last": [4]}
    assert read(results, "dies")["reason"].startswith("killed by SIGSEGV")
    assert read(results, "lacks")["reason"] == "no such part"
    assert read(results, "first")["device"] == "a test"
    assert "AssertionError" in (results / "raises.log").read_text()
    assert "said ''" in (results / "last.log").read_text()  # nothing to wait for
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))
    assert not list(results.glob("*.partial"))

    flag.touch()
    before = read(results, "first")
    assert _run([s for s in stages if s[0] != "hangs"], results, complete=False) == [n for n in names if n != "hangs"]
    assert _states(results) == states | {"raises": "done"}
    assert read(results, "first") == before
    assert read(results, "raises")["rows"] == [{"table": "table", "value": 2}]  # of the second attempt alone
    assert _run(stages[:1], results, 60, "again") == ["first"]
    assert read(results, "first")["begun"] >= before["begun"]
    assert (results / "first.log").read_text().count("== ") == 2


@pytest.mark.heavy
def test_the_whole_has_a_limit_and_what_it_cuts_is_run_by_the_next_call(tmp_path):
    stages = [("long", 600, ROW % 1 + HANG), ("next", 60, ROW % 2)]
    _run(stages, tmp_path, 12, complete=False)
    assert _states(tmp_path) == {"long": "cut"}  # no time was left for the other
    assert read(tmp_path, "long")["limit"] == 12 and read(tmp_path, "long")["rows"][0]["value"] == 1
    _run([("long", 60, ROW % 3), stages[1]], tmp_path)
    assert _states(tmp_path) == {"long": "done", "next": "done"}
    assert read(tmp_path, "long")["rows"] == [{"table": "table", "value": 3}]


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_whole_files_and_the_next_call_goes_on(number, tmp_path):
    stages = [("first", 60, ROW % 1), ("second", 600, ROW % 2 + HANG), ("third", 60, ROW % 3)]
    process = subprocess.Popen(_command(stages, tmp_path, 600), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not read(tmp_path, "second").get("rows"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    (stage,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    process.wait(60)
    if number == signal.SIGTERM:
        assert not is_running(stage) and _states(tmp_path) == {"first": "done", "second": "cut"}
    else:  # nobody was left to end the stage
        stage.kill()
        assert _states(tmp_path) == {"first": "done", "second": "running"}
    assert read(tmp_path, "second")["rows"] == [{"table": "table", "value": 2}]
    stages[1] = ("second", 60, ROW % 4)
    _run(stages, tmp_path)
    assert _states(tmp_path) == {"first": "done", "second": "done", "third": "done"}
