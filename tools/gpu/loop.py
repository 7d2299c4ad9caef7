"""The loop's stage: sampling with SGLang, training, new weights, on one device, with the tiny model.

Each attempt is a whole run of two steps in a process of its own; every weight in SGLang is compared with the engine's
after every push. If SGLang's compiled kernels are not installed, tools/gpu/standin has the few that Qwen3 needs. If
SGLang does not serve on the GPU at all, a server on this machine's CPU takes its place; with DEVICE=cpu it is one
attempt more.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.gpu.results import absent, record

ON_GPU = os.environ.get("DEVICE") != "cpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
SECONDS = 90 if ON_GPU else 360  # of an attempt; the stage's limit in stages.py holds all of them
COMMAND = [
    sys.executable, "-m", "megatron_egrsd.cli", "train", "--config", "examples/configs/tiny_cpu.yaml",
    "--steps", "2", "--data.evaluation", "", "--rollout.prompts_per_step", "16",
    "--rollout.max_response_tokens", "64", "--rollout.sync.verify", "true", "--rollout.servers.max_restarts", "0",
    "--model.dtype", DTYPE,
]  # fmt: skip
# Of SGLang's kernels these need the fewest compiled ones.
ON_DEVICE = [
    "--rollout.servers.args.attention_backend", "triton", "--rollout.servers.args.sampling_backend", "pytorch",
    "--rollout.servers.args.mem_fraction_static", "0.3", "--rollout.servers.args.disable_cuda_graph", "true",
] if ON_GPU else []  # fmt: skip
ATTEMPTS = {
    "disk": ["--rollout.sync.transport", "disk"],
    "ipc": ["--rollout.sync.transport", "ipc"],
    "ipc, colocated": ["--rollout.sync.transport", "ipc", "--rollout.servers.colocated", "true"],
}


def main() -> None:
    try:
        import sglang
    except ImportError as error:
        absent(f"SGLang cannot be imported: {error}")
    environment = dict(os.environ)
    if ON_GPU and importlib.util.find_spec("sgl_kernel") is None:
        path = (str(Path(__file__).parent / "standin"), os.environ.get("PYTHONPATH", ""))
        environment |= {"PYTHONPATH": os.pathsep.join(path), "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1"}
        print("SGLang's compiled kernels are not installed: a stand-in in plain torch takes their place", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        served = [attempt(name, [*options, *ON_DEVICE], scratch, environment) for name, options in ATTEMPTS.items()]
        if not any(served) or not ON_GPU:
            served.append(with_a_server_on_the_cpu(scratch))
    print(f"SGLang {sglang.__version__}", flush=True)
    sys.exit(not any(served))


def attempt(name: str, options: list[str], scratch: Path, environment: dict[str, str]) -> bool:
    """Run the loop once and record what it measured, or the last line that it said; return whether it worked."""
    output, start = scratch / name.replace(", ", "-"), time.monotonic()
    process = subprocess.Popen([*COMMAND, *options, "--output", str(output)], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True,
                               env=environment)  # fmt: skip
    try:
        said, _ = process.communicate(timeout=SECONDS)
        reason = "" if process.returncode == 0 else (said.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its servers die with it
        said, _ = process.communicate()
        reason = f"no end within {SECONDS} s"
    print(said, flush=True)
    seconds = round(time.monotonic() - start, 1)
    if reason:
        for log in sorted(output.glob("**/*.log")):
            print(f"-- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n", flush=True)
        record("loop", attempt=name, worked=False, seconds=seconds, complaint=reason[:300])
        return False
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "time/train" in row]
    times = {key: round(rows[-1][f"time/{key}"], 3) for key in ("generate", "score", "train", "sync")}
    differences = [row["sync/log_prob_difference"] for row in rows]
    record("loop", attempt=name, worked=True, seconds=seconds, log_prob_difference=differences, **times)
    return True


def with_a_server_on_the_cpu(scratch: Path) -> bool:
    """Train on the GPU with the rollouts of a server that sees none."""
    from megatron_egrsd.rollout.cpu_platform import NAME
    from megatron_egrsd.rollout.ports import choose_ports

    (port,) = choose_ports("127.0.0.1", 0, 1)
    command = [
        sys.executable, "-m", "megatron_egrsd.rollout.launch", "--model-path", "examples/tiny/model", "--device", "cpu",
        "--port", str(port), "--dtype", DTYPE, "--sampling-backend", "pytorch", "--disable-cuda-graph",
        "--skip-tokenizer-init", "--skip-server-warmup", "--weight-version", "0", "--max-total-tokens", "65536",
        "--max-running-requests", "64", "--sleep-on-idle", *(["--enable-fp32-lm-head"] if ON_GPU else []),
    ]  # fmt: skip
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "SGLANG_PLATFORM": NAME, "OMP_NUM_THREADS": "4"}
    server = subprocess.Popen(command, env=hidden, start_new_session=True)
    try:
        options = ["--rollout.servers.urls", json.dumps([f"http://127.0.0.1:{port}"])]
        return attempt("disk, server on the CPU", [*options, *ATTEMPTS["disk"]], scratch, dict(os.environ))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


if __name__ == "__main__":
    main()
