"""The example configurations and scripts, as far as they can be checked without a cluster."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapters import adapter_spec
from megatron_egrsd.rollout.server_command import first_gpu
from tests.command_line import run_command

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = [*sorted(EXAMPLES.glob("run_*.sh")), *sorted(EXAMPLES.glob("slurm/*.sbatch"))]
RUNS = RUN_4B, RUN_8B, RUN_30B = [EXAMPLES / f"run_qwen3_{size}_cl_egrsd.sh" for size in ("4b", "8b", "30b_a3b")]
TINY = {"MODEL": "examples/tiny/model", "DATA": "examples/tiny/train.jsonl"}
# Training ranks that each configuration and script is written for, up to the largest run of docs/guides/cluster.md.
WORLDS = {
    "tiny_cpu.yaml": (1, 2, 4),
    "smollm2_cpu_warm_start.yaml": (1, 2, 4),
    "smollm2_cpu.yaml": (1, 2, 4),
    "qwen3_4b_cl_egrsd.yaml": (1, 2, 4, 8, 16, 32),
    "qwen3_8b_cl_egrsd.yaml": (1, 2, 4, 8, 16, 32),
    "qwen3_30b_a3b_cl_egrsd.yaml": (8, 16, 32, 64),
}


def environment(**variables: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "SLURM_NODEID")}
    return clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables


def run(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", script, *words], cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*.yaml")), ids=lambda p: p.name)
def test_configurations_parse_and_their_batches_divide(path):
    config = parse_config(["--config", str(path)])
    for world in WORLDS[path.name]:
        assert config.check_world(world) * config.parallel.model_parallel == world
    assert config.parallel.timeout > config.rollout.servers.start_timeout  # the other ranks wait for rank 0
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    assert path.name == "tiny_cpu.yaml" or longest <= config.parallel.max_tokens_per_microbatch


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", script], timeout=20).returncode == 0
    text = script.read_text()
    assert "set -euo pipefail" in text and "pkill" not in text and "killall" not in text


def test_a_slurm_job_has_the_gpus_of_its_nodes_and_leaves_the_others_time_to_say_why(tmp_path):
    stubs = {"scontrol": "printf 'node3\\nnode7\\n'", "srun": 'echo "$MASTER_ADDR $GPUS_PER_NODE $*"'}
    for name, line in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    script = EXAMPLES / "slurm/run.sbatch"
    job = {"JOB_NUM_NODES": "2", "JOB_NODELIST": "node[3,7]", "JOB_ID": "5", "GPUS_ON_NODE": "4"}
    job = {f"SLURM_{name}": value for name, value in job.items()} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    options = "--kill-on-bad-exit=0 --wait=60 --export=ALL bash examples/run_qwen3_8b_cl_egrsd.sh --steps 7"
    assert run(script, "--steps", "7", **job).stdout == f"node3 4 {options}\n"
    assert run(script, **job, GPUS_PER_NODE="2").stdout.startswith("node3 2 ")
    directives = re.findall(r"^#SBATCH (\S+)", script.read_text(), re.M)
    assert {"--requeue", "--open-mode=append", "--exclusive", "--mem=0"} <= set(directives)


@pytest.mark.parametrize("name", ["reproduce_paper.sh", "validate_method.sh"])
def test_studies_run_in_the_active_environment_or_in_that_of_make_install(name, tmp_path):
    script, active = tmp_path / "examples" / name, tmp_path / "active"
    script.parent.mkdir()
    script.write_text((EXAMPLES / name).read_text())
    for place in (tmp_path / ".venv/bin/python", active / "python", active / "megatron-egrsd"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"#!/bin/sh\necho {place.relative_to(tmp_path)}\n")
        place.chmod(0o755)

    def chosen() -> str:
        environment = {"PATH": f"{active}:/usr/bin:/bin"}
        return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=20).stdout

    assert chosen() == "active/python\n"
    (active / "megatron-egrsd").unlink()
    assert chosen() == ".venv/bin/python\n"
    (tmp_path / ".venv/bin/python").unlink()
    assert chosen() == "active/python\n"


@pytest.mark.parametrize("script", RUNS, ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MODEL": "no/model"}, "no Hugging Face checkpoint in no/model"),
        ({"DATA": "no/train.jsonl"}, "no training file no/train.jsonl"),
        ({"EVAL_DATA": "no/eval.jsonl"}, "no evaluation file no/eval.jsonl"),
        ({"CONFIG": "no.yaml"}, "no configuration file no.yaml"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}, "NODE_RANK is ''"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "NODE_RANK": "2"}, "NODE_RANK is '2'"),
        ({"NNODES": "two"}, "NNODES is 'two'"),
        ({"CONTEXT": "no"}, "CONTEXT is 'no'"),
        ({"NPROC_PER_NODE": "8"}, "takes 1 GPU(s), and GPUS_PER_NODE=8, NPROC_PER_NODE=8 and COLOCATED=0 leave 0"),
        ({"COLOCATED": "1", "ENGINE_TENSOR": "16"}, "an SGLang server takes 16 GPU(s), and GPUS_PER_NODE=8, "),
        ({"COLOCATED": "yes"}, "COLOCATED is 'yes'"),
        ({"LORA_RANK": "-1"}, "LORA_RANK is '-1'"),
        ({"FULL_TENSOR": "0"}, "FULL_TENSOR is '0'"),
        ({"COLOCATED": "1", "ROLLOUT_URLS": "http://a:1"}, "COLOCATED=1 launches its servers, and ROLLOUT_URLS"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_scripts_refuse_in_one_sentence(script, variables, reason):
    done = run(script, **(TINY | {"ENGINE_TENSOR": "1"} | variables))
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.fixture
def started(tmp_path):
    """Return a function that runs a script: torchrun's arguments, and the configuration of the training ranks."""
    stub = tmp_path / "torchrun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)

    def start(script: Path, *words: str, **variables: str):
        done = run(script, *words, PATH=f"{tmp_path}:{os.environ['PATH']}", **(TINY | variables))
        assert done.returncode == 0, done.stderr
        launch, _, arguments = done.stdout.partition("-m\nmegatron_egrsd.cli\ntrain\n")
        return launch.split("\n"), parse_config(arguments.removesuffix("\n").split("\n"))

    return start


@pytest.mark.parametrize(
    ("script", "rank", "tensor", "data_parallel"),
    [(RUN_4B, "", 1, 4), (RUN_8B, "", 1, 4), (RUN_8B, "16", 1, 4), (RUN_4B, "0", 2, 2), (RUN_8B, "0", 4, 1)],
    ids=["4b", "8b", "8b rank 16", "4b all weights", "8b all weights"],
)
def test_a_node_of_eight_gpus(script, rank, tensor, data_parallel, started):
    """Adapters as in the paper, or all weights in a layout of their own."""
    launch, config = started(script, "--steps", "7", "--objective.mix", "0.25", LORA_RANK=rank, SEED="3")
    assert launch[:6] == ["--nnodes", "1", "--node-rank", "0", "--nproc-per-node", "4"]
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (int(rank or "64"), None, list(TARGETS))
    if rank != "0":
        assert adapter_spec(config.lora).alpha == {"": 128, "16": 32}[rank]
    assert config.parallel.tensor == tensor and config.parallel.sequence_parallel == (tensor > 1)
    assert config.check_world(4) == data_parallel
    assert config.rollout.servers.engines == 4 and first_gpu(config.rollout.servers, 4, 8) == 4
    assert first_gpu(config.rollout.servers, 4, 4) == 0  # a node of four: refused, as a rank has that GPU
    assert (config.steps, config.objective.mix, config.seed) == (7, 0.25, 3)
    assert config.model.path == TINY["MODEL"] and config.data.evaluation == ""


@pytest.mark.parametrize(
    ("script", "variables", "reason"),
    [
        (RUN_4B, {"NPROC_PER_NODE": "3", "LORA_RANK": "0"}, "3 training ranks do not divide into replicas"),
        pytest.param(
            RUN_4B,
            {"CONTEXT": "3"},
            "parallel.tensor x parallel.pipeline x parallel.context = 1 x 1 x 3 = 3",
            marks=pytest.mark.slow,
        ),
        (RUN_30B, {"SEED": "two"}, "seed is 'two'"),
    ],
    ids=["nproc", "context", "seed"],
)
@pytest.mark.heavy
def test_the_program_refuses_a_layout_in_one_sentence(script, variables, reason):
    done = run(script, "--dry-run", **TINY, **variables)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_layout_is_that_of_the_configuration(started, tmp_path):
    """A variable that is set, and a word, replace it."""
    config = tmp_path / "own.yaml"
    text = (EXAMPLES / "configs/qwen3_8b_cl_egrsd.yaml").read_text()
    config.write_text(text.replace("tensor: 1", "tensor: 2").replace("tensor_parallel: 1", "tensor_parallel: 2"))
    _, own = started(RUN_8B, CONFIG=str(config))
    assert (own.parallel.tensor, own.rollout.servers.tensor_parallel, own.rollout.servers.engines) == (2, 2, 2)
    _, own = started(RUN_8B, "--rollout.servers.tensor_parallel", "4", CONFIG=str(config), TENSOR="1")
    assert (own.parallel.tensor, own.parallel.sequence_parallel, own.rollout.servers.engines) == (1, False, 1)


def test_servers_of_two_gpus(started):
    _, config = started(RUN_8B, ENGINE_TENSOR="2")
    assert config.rollout.servers.engines == 2 and config.rollout.servers.tensor_parallel == 2


def test_external_servers_leave_every_gpu_to_training(started):
    nodes = {"NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "10.0.0.1", "PIPELINE": "2", "LORA_RANK": "0"}
    launch, config = started(RUN_8B, ROLLOUT_URLS="http://a:1,http://b:2", **nodes)
    assert launch[launch.index("--node-rank") + 1] == "1" and launch[launch.index("--nproc-per-node") + 1] == "8"
    assert config.rollout.servers.urls == ["http://a:1", "http://b:2"] and config.rollout.servers.args == {}
    assert config.check_world(16) == 2


def test_colocated_servers_share_every_gpu_with_the_training_ranks(started):
    launch, config = started(RUN_8B, COLOCATED="1", ENGINE_TENSOR="2")
    assert launch[launch.index("--nproc-per-node") + 1] == "8" and config.rollout.servers.engines == 4
    assert (
        config.rollout.servers.colocated
        and config.rollout.sync.transport == "ipc"
        and config.rollout.servers.args == {}
    )


def test_long_responses_on_two_nodes(started):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "CONTEXT": "4", "LORA_RANK": "0"}
    words = ("--rollout.max_response_tokens", "32768")
    _, config = started(RUN_8B, *words, ROLLOUT_URLS="http://a:1", **nodes)
    assert (config.parallel.context, config.parallel.tensor, config.check_world(16)) == (4, 4, 1)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    assert config.parallel.tokens_on_a_rank(longest) <= config.parallel.max_tokens_per_microbatch


@pytest.mark.heavy
def test_dry_run_is_one_process_for_every_rank(tmp_path):
    words = ("--dry-run", "--rollout.max_response_tokens", "200")
    done = run(RUN_4B, *words, NNODES="4", OUTPUT=str(tmp_path / "run"), **TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layout      16 ranks = TP 1 x PP 1 x DP 16, distributed optimizer") == 1
    assert done.stdout.count("LoRA r 64, alpha 128, on q_proj") == 1


def test_a_mixture_on_two_nodes(started):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "ROLLOUT_URLS": "http://a:1"}
    _, config = started(RUN_30B, **nodes)
    assert (config.parallel.tensor, config.parallel.expert, config.check_world(16)) == (4, 8, 4)
    assert started(RUN_30B)[1].rollout.servers.engines == 1  # of four GPUs
    assert config.lora.rank == 0 and started(RUN_30B, LORA_RANK="64")[1].lora.targets == list(ATTENTION)
    with pytest.raises(BadArgument, match=r"parallel.expert = 3 does not divide the 16 ranks"):
        started(RUN_30B, **nodes, EXPERT="3")[1].check_world(16)


@pytest.mark.parametrize(
    ("torchrun", "status"),
    [("echo > started; exec sleep 60", 143), ("sleep 60 & echo > started; wait $!; exit 0", 0)],
    ids=["waits for the nodes", "has a rank"],
)
@pytest.mark.heavy
def test_sigterm_reaches_the_ranks_or_a_torchrun_without_any(torchrun, status, tmp_path):
    stub = tmp_path / "torchrun"
    stub.write_text(f"#!/bin/sh\ncd {tmp_path}\n{torchrun}\n")
    stub.chmod(0o755)
    variables = TINY | {"ENGINE_TENSOR": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", RUN_8B], cwd=ROOT, env=environment(**variables))

    def traps() -> bool:
        caught = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
        return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    deadline = time.monotonic() + 60
    while not (traps() and (tmp_path / "started").exists()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == status


@pytest.mark.heavy
def test_plan_of_a_mixture():
    done = run_command("plan", "--models", "Qwen3-30B-A3B", "--gpus", "64", "--machine", "H100")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| Qwen3-30B-A3B | 64 | ") == 1
