"""The stages of a session on a GPU, in order of value. tools/gpu/run.sh calls this; docs/guides/gpu.md explains it.

Stages measure; a number that misses its goal is a row with a complaint, not a failure. tools/gpu/report.py turns the
results into docs/measurements/gpu.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tools.gpu.runner import Stage, run

RESULTS = Path("build/gpu/results")
_FACTS = """
import json, platform, torch
gpu = torch.cuda.is_available()
print(json.dumps({"device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__, "gpu": gpu,
                  "python": platform.python_version()}))
"""


def stages(python: str = sys.executable) -> list[Stage]:
    """Return all stages. Limits are several times what each is expected to take on one H200, and more on the CPU."""
    patience = 4 if os.environ.get("DEVICE") == "cpu" else 1

    def stage(name: str, seconds: float, module: str, *arguments: str, about: str) -> Stage:
        return Stage(name, seconds * patience, (python, "-m", f"tools.gpu.{module}", *arguments), about)

    return [
        stage("build", 180, "kernels", "build", about="the extension, with its CUDA part"),
        stage("kernel-tests", 180, "kernels", "tests", about="tests/gpu: the CUDA kernels against the CPU's"),
        stage("kernel-speed", 300, "kernels", "speed", about="kernels as a fraction of copy bandwidth, beside others"),
        stage("training", 180, "training", "local", about="tiny and 0.6B, local layers: log-probs, memory, seconds"),
        stage("te-build", 300, "training", "build", about="Transformer Engine's PyTorch part"),
        stage("te-training", 150, "training", "fused", about="the same with Transformer Engine's layers"),
        stage("adapters", 120, "training", "lora", about="the same with adapters (LoRA)"),
        stage("divergence-speed", 180, "kernels", "divergences", about="divergences beside one read of the logits"),
        stage("loop", 400, "loop", about="the whole loop with SGLang on the same device"),
        stage("recompute", 90, "training", "recompute", about="the same with recomputed activations"),
        stage("fp8", 90, "training", "fp8", about="the same with FP8 matrix products"),
    ]


def facts(python: str = sys.executable) -> dict:
    """Return what describes the machine: its device, torch and Python, by a process of its own."""
    done = subprocess.run([python, "-c", _FACTS], capture_output=True, text=True, timeout=180)
    if done.returncode:
        sys.exit(f"error: {python} cannot import torch: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def main() -> None:
    start = time.monotonic()
    device = os.environ.setdefault("DEVICE", "cuda")
    names = [stage.name for stage in stages()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minutes", type=float, help="for all stages together")
    parser.add_argument("--only", nargs="+", choices=names, help="these stages, also if they are done")
    arguments = parser.parse_args()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    machine = facts()
    if machine.pop("gpu") != (device == "cuda"):
        sys.exit("error: no CUDA device; DEVICE=cpu runs the CPU's counterparts of the stages")
    chosen = [stage for stage in stages() if stage.name in (arguments.only or names)]
    directory = Path(os.environ.get("RESULTS", RESULTS))
    seconds = arguments.minutes * 60 - (time.monotonic() - start)
    sys.exit(not run(chosen, directory, seconds, machine, again=bool(arguments.only)))


if __name__ == "__main__":
    main()
