"""The training stages: benchmarks/check_training.py in the settings whose names are the stages' arguments.

    python -m tools.gpu.training local | build | fused | lora | recompute | fp8

`build` compiles Transformer Engine's PyTorch part against this machine's torch, from the source in build/gpu/sources.
With DEVICE=cpu the model is the tiny one, and what needs Transformer Engine's kernels is absent.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.gpu.results import absent, record

ON_GPU = os.environ.get("DEVICE") != "cpu"
MODELS = ["tiny", "0.6B"] if ON_GPU else ["tiny"]
BUILD = Path("build/gpu")
ENGINE = (BUILD / f"te-{sys.version_info.major}.{sys.version_info.minor}").absolute()  # Transformer Engine
SOURCES = BUILD / "sources"
# NCCL_EP concerns mixtures over several nodes; FORCE_BUILD keeps the source from asking the network for a wheel.
_BUILD = {"NVTE_PYTORCH_FORCE_BUILD": "TRUE", "NVTE_WITH_NCCL_EP": "0", "NVTE_FRAMEWORK": "pytorch",
          "MAX_JOBS": str(os.cpu_count())}  # fmt: skip


def build() -> None:
    """Compile and install transformer_engine_torch, and say whether its library loads."""
    sources = sorted(SOURCES.glob("transformer_engine_torch-*.tar.gz"))
    if not ON_GPU or not sources:
        absent(f"no source of transformer_engine_torch in {SOURCES}" if ON_GPU else "it needs a CUDA build of torch")
    # cuDNN's headers come with torch's packages, not with the toolkit.
    found = importlib.util.find_spec("nvidia")
    headers = [str(path) for root in found.submodule_search_locations for path in Path(root).glob("*/include")]
    path = os.pathsep.join((str(ENGINE), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | _BUILD | {"CPLUS_INCLUDE_PATH": os.pathsep.join(headers), "PYTHONPATH": path}
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--upgrade",
         "--target", str(ENGINE), str(sources[-1])],
        check=True, env=environment,
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", "import transformer_engine.pytorch"], check=True, env=environment)
    record("build", source=sources[-1].name, imported=True)


def train(setting: str) -> None:
    """Train every model in one setting, a row each; a model that fails does not stop the next one."""
    layers = "always" if setting in ("fused", "fp8") else "never"
    if layers == "always":
        sys.path.insert(0, str(ENGINE))
        if not ON_GPU or importlib.util.find_spec("transformer_engine_torch") is None:
            absent("Transformer Engine is not compiled" if ON_GPU else "Transformer Engine needs a GPU")
    from megatron_egrsd.config import ParallelConfig
    from megatron_egrsd.config.lora import LoraConfig

    parallel = ParallelConfig(transformer_engine=layers, recompute=setting == "recompute")
    if setting == "fp8":
        parallel = ParallelConfig(transformer_engine=layers, megatron={"fp8": "hybrid"})
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            try:
                _train(name, parallel, LoraConfig(rank=64 if setting == "lora" else 0), Path(scratch))
            except Exception as error:
                failed.append(name)
                record("failed", model=name, error=f"{type(error).__name__}: {error}"[:500])
                if len(failed) == len(MODELS):
                    raise
    sys.exit(bool(failed))


def _train(name: str, parallel, lora, scratch: Path) -> None:
    from benchmarks.check_training import check

    result = check(name, "bfloat16", scratch, parallel, lora)
    gib = 1 << 30
    record(
        "bf16, all but the first of three steps", model=name, parameters=result.parameters,
        layers="Transformer Engine" if parallel.transformer_engine == "always" else "local",
        log_prob_difference=[float(f"{d:.2e}") for d in result.differences],
        tokens_per_second=round(result.tokens / result.seconds), seconds=round(result.seconds, 3),
        planned_seconds=round(result.planned, 3) or None,
        peak_gib=round(result.peak / gib, 2) or None, planned_gib=round(result.predicted / gib, 2),
        runtime_gib=round(result.runtime / gib, 2) or None,
        # FP8 has no limit for log-probs: how far off it is, is what the stage tells.
        **{"complaint": text} if (text := result.complaint()) and "fp8" not in parallel.megatron else {},
    )  # fmt: skip


if __name__ == "__main__":
    build() if sys.argv[1] == "build" else train(sys.argv[1])
