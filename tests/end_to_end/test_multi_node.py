"""The example script on two hosts: network namespaces with addresses of their own and a cable (veth) between them.

Traffic stays between the two and their loopbacks. Needs root and iproute2, and is skipped without.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_egrsd.config.lora import TARGETS
from megatron_egrsd.rollout import cpu_platform
from tests.faults.runs import PER_PROMPT, PROMPTS, Run, replayed, write_replay

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT = 120  # seconds a collective may take; it includes the start of SGLang, for which the second host waits
OVERRIDES = {
    "model.dtype": "float32",
    "rollout.prompts_per_step": 8,
    "rollout.rollouts_per_prompt": 8,
    "rollout.max_response_tokens": 120,
    "rollout.servers.max_total_tokens": 16384,
    "rollout.sync.verify": "true",
    "evaluation.rollouts_per_problem": 1,
    "rollout.servers.health_timeout": 30,  # after which the first host gives up the other one's server
    "rollout.servers.request_timeout": TIMEOUT - 20,
    "parallel.timeout": TIMEOUT,
}


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout


class Host:
    """A network namespace, and the processes in it."""

    def __init__(self, rank: int):
        self.rank = rank
        self.name = f"egrsd-{os.getpid()}-{rank}"
        self.cable = f"egrsd{rank}"
        self.started: list[subprocess.Popen] = []

    def popen(self, words: list[str], log: Path, **variables: str) -> subprocess.Popen:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            # Both hosts have this machine's name, so gloo must be told the network interface to use.
            "GLOO_SOCKET_IFNAME": self.cable,
        } | variables  # fmt: skip
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *words],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process)
        return process

    def train(self, output: Path, steps: int, overrides: dict | None = None, **variables: str) -> None:
        """Start the example script, as a user does on each node."""
        settings = {**OVERRIDES, "steps": steps, **(overrides or {})}
        words = [w for k, v in settings.items() for w in (f"--{k}", str(v))]
        variables = {
            "NNODES": "2", "NODE_RANK": str(self.rank), "MASTER_ADDR": ADDRESSES[0], "RENDEZVOUS_TIMEOUT": "120",
            "NPROC_PER_NODE": "1", "GPUS_PER_NODE": "2", "TENSOR": "1", "PIPELINE": "2",
            "MODEL": "examples/tiny/model", "DATA": "examples/tiny/train.jsonl",
            "EVAL_DATA": "examples/tiny/heldout.jsonl", "OUTPUT": str(output),
        } | variables  # fmt: skip
        self.log = output.parent / f"host-{self.rank}.log"
        self.process = self.popen(["bash", "examples/run_qwen3_8b_cl_egrsd.sh", *words], self.log, **variables)

    def processes(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def reasons(self) -> list[str]:
        return re.findall(r"^megatron-egrsd: error: .*", self.log.read_text(), re.M)

    def tail(self) -> str:
        return f"--- host {self.rank}\n{self.log.read_text()[-4000:]}"


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are two network namespaces: that takes root and `ip` (iproute2)")
    pair = Host(0), Host(1)
    with contextlib.ExitStack() as stack:
        for host in pair:
            try:
                ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
            stack.callback(ip, "netns", "del", host.name)
        first, second = pair
        ip("link", "add", first.cable, "netns", first.name, "type", "veth",
           "peer", "name", second.cable, "netns", second.name)  # fmt: skip
        for host, address in zip(pair, ADDRESSES, strict=True):
            ip("-n", host.name, "address", "add", f"{address}/24", "dev", host.cable)
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "link", "set", host.cable, "up")
            stack.callback(end, host)
        yield pair


def end(host: Host) -> None:
    """Kill the remaining processes of a namespace, by process id."""
    for pid in host.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in host.started:
        process.wait(20)


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "loss/policy" in row]


def servers(host: Host) -> list[psutil.Process]:
    """Return the leaders of the SGLang servers in a namespace."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = map(psutil.Process, host.processes())
        return [p for p in processes if "megatron_egrsd.rollout.launch" in p.cmdline()]
    return servers(host)  # one ended meanwhile


def wait_for(condition: Callable[[], bool], hosts: tuple[Host, Host], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(host.process.poll() is None for host in hosts), hosts[0].tail() + hosts[1].tail()
        assert time.monotonic() < deadline, hosts[0].tail() + hosts[1].tail()
        time.sleep(0.2)


def finish(hosts: tuple[Host, Host], output: Path) -> None:
    """Check that both hosts succeed, that the weights agree in two steps, and that the trained model is written."""
    for host in hosts:
        host.process.wait(300)
    assert [host.process.returncode for host in hosts] == [0, 0], hosts[0].tail() + hosts[1].tail()
    steps = metrics(output)
    assert [m["step"] for m in steps] == [1, 2]
    # SGLang sampled with the weights that both stages sent it: the start's in step 1, the synchronised ones in step 2.
    assert all(m["sync/log_prob_difference"] < 1e-5 for m in steps)
    assert all(m["optimizer/grad_norm"] > 0 for m in steps)
    from safetensors.torch import load_file

    start = load_file(ROOT / "examples/tiny/model/model.safetensors")
    trained = load_file(output / "hf" / "model.safetensors")
    adapted = {k for k in start if any(f".{name}." in k for name in TARGETS)}  # the configuration trains adapters
    assert trained.keys() == start.keys() and {k for k in start if not trained[k].equal(start[k])} == adapted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pipeline_across_two_hosts(hosts, tmp_path):
    """TP within each host, PP between them."""
    for host in hosts:
        host.train(tmp_path / "run", steps=2, TENSOR="2", NPROC_PER_NODE="2", GPUS_PER_NODE="3")
    finish(hosts, tmp_path / "run")
    assert [host.processes() for host in hosts] == [[], []]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_give_the_numbers_of_one(hosts, tmp_path):
    """The same rollouts, replayed: TP 2 x PP 2 across the cable, against one process without torchrun."""
    from safetensors.torch import load_file

    steps = 3
    overrides = {
        **replayed(write_replay(tmp_path / "replay", steps)), "data.evaluation": "", "checkpoint.every": 1,
        "rollout.prompts_per_step": PROMPTS, "rollout.rollouts_per_prompt": PER_PROMPT, "rollout.sync.verify": "false",
    }  # fmt: skip
    two = tmp_path / "two"
    for host in hosts:
        host.train(two, steps, overrides, TENSOR="2", NPROC_PER_NODE="2", GPUS_PER_NODE="3", EVAL_DATA="")
    for host in hosts:
        assert host.process.wait(300) == 0, host.tail()
    one = tmp_path / "one"
    config = {"config": ROOT / "examples/configs/qwen3_8b_cl_egrsd.yaml", "parallel.tensor": 1,
              "parallel.sequence_parallel": "false", "data.max_prompt_tokens": 512}  # fmt: skip
    with Run(one, steps=steps, **{**OVERRIDES, **overrides, **config}) as run:
        assert run.finish() == 0, run.text()
    for a, b in zip(metrics(two), metrics(one), strict=True):
        for key in ("loss/policy", "optimizer/grad_norm", "student/entropy", "teacher/entropy", "gate/mean"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    got, want = (load_file(path / "hf" / "model.safetensors") for path in (two, one))
    assert all((got[k] - want[k]).norm() < 1e-5 * want[k].norm() for k in want)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_server_is_on_the_other_host(hosts, tmp_path):
    """ROLLOUT_URLS, and weights that cross the cable: the command of docs/guides/cluster.md with CPU flags."""
    server = hosts[1].popen(
        [sys.executable, "-m", "megatron_egrsd.rollout.launch", "--model-path", "examples/tiny/model",
         "--host", ADDRESSES[1], "--port", "30000", "--dtype", "float32", "--weight-version", "0",
         "--skip-tokenizer-init", "--skip-server-warmup",
         "--device", "cpu", "--sampling-backend", "pytorch", "--disable-cuda-graph", "--max-total-tokens", "16384"],
        tmp_path / "server.log", SGLANG_PLATFORM=cpu_platform.NAME,
    )  # fmt: skip
    for host in hosts:
        host.train(tmp_path / "run", steps=2, ROLLOUT_URLS=f"http://{ADDRESSES[1]}:30000")
    finish(hosts, tmp_path / "run")
    assert server.poll() is None, "a server that the user started is the user's to end"
    assert hosts[0].processes() == [] and not (tmp_path / "run" / "logs").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("placement", ["apart", "in turns"])
def test_every_host_serves_and_one_loses_its_server(hosts, placement, tmp_path):
    """The second host's server is killed; its host starts it again, and it takes part again."""
    output, steps = tmp_path / "run", 5
    in_turns = {"rollout.servers.colocated": "true", "rollout.sync.transport": "ipc"} if placement == "in turns" else {}
    for host in hosts:
        host.train(output, steps, in_turns, TENSOR="2", NPROC_PER_NODE="2", GPUS_PER_NODE="3")
    wait_for(lambda: len(metrics(output)) == 1, hosts, 200)
    [_], [server] = map(servers, hosts)
    words = server.cmdline()
    url = f"http://{ADDRESSES[1]}:{words[words.index('--port') + 1]}/model_info"
    ask = hosts[0].popen([sys.executable, "-c", f"import httpx; print(httpx.get('{url}'))"], tmp_path / "asked.log")
    assert ask.wait(60) == 0 and "401" in (tmp_path / "asked.log").read_text(), "a stranger is let in"
    server.kill()
    for host in hosts:
        assert host.process.wait(400) == 0, hosts[0].tail() + hosts[1].tail()
    rows = metrics(output)
    assert [row["step"] for row in rows] == list(range(1, steps + 1)) and rows[-1]["rollout/restarts"] > 0
    assert all(row["sync/log_prob_difference"] < 1e-5 for row in rows)
    assert "starting it again (1 of 10 restarts)" in hosts[1].log.read_text()
    logs = output / "logs"
    for log in (logs / "sglang-0.log", logs / "node-1/sglang-0.log", logs / "node-1/sglang-0-restart-1.log"):
        assert "Prefill batch" in log.read_text(), f"{log} has sampled nothing"
    deadline = time.monotonic() + 10  # torch's manager of shared memory ends by itself, seconds after its clients
    while any(host.processes() for host in hosts) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [host.processes() for host in hosts] == [[], []]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cable_is_cut_and_the_same_command_continues(hosts, tmp_path):
    output = tmp_path / "run"
    save = {"checkpoint.every": 1}
    for host in hosts:
        host.train(output, 10_000, save, TENSOR="2", NPROC_PER_NODE="2", GPUS_PER_NODE="3")
    saved = lambda: list((output / "checkpoints").glob("step_??????"))  # noqa: E731
    wait_for(lambda: bool(saved()), hosts, 200)
    # The first host may be sampling: its own wait begins when it next needs the other.
    ip("-n", hosts[1].name, "link", "set", hosts[1].cable, "down")
    cut = time.monotonic()
    for host in hosts:
        host.process.wait(max(0, cut + TIMEOUT + 120 - time.monotonic()))
    print(f"both ended {time.monotonic() - cut:.0f} s after the cut", [host.reasons() for host in hosts])

    assert all(host.process.returncode == 1 for host in hosts), hosts[0].tail() + hosts[1].tail()
    for host in hosts:
        assert len(host.reasons()) == 1, host.tail()
    assert [host.processes() for host in hosts] == [[], []]
    assert not (output / "hf").exists()

    ip("-n", hosts[1].name, "link", "set", hosts[1].cable, "up")
    done = max(int(p.name.removeprefix("step_")) for p in saved())
    for host in hosts:
        host.train(output, done + 1, save, TENSOR="2", NPROC_PER_NODE="2", GPUS_PER_NODE="3")
    for host in hosts:
        assert host.process.wait(300) == 0, host.tail()
    assert [m["step"] for m in metrics(output)] == list(range(1, done + 2))
    assert (output / "hf" / "model.safetensors").exists()
