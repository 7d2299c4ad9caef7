"""The compiled parts' own checks as tests: sanitizers over the CPU core, the CUDA part without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).parents[2]


def _run(script: str, *words: str) -> str:
    command, environment = [ROOT / "tools" / script, *words], os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.slow
def test_sanitizers_find_nothing_in_the_cpu_core():
    assert _run("check_sanitizers.sh").count(": ok") == 4


@pytest.mark.parametrize(
    "architectures", [["sm_90"], pytest.param(["sm_80", "sm_90", "sm_100"], marks=pytest.mark.slow)]
)
def test_cuda_kernels_compile(architectures):
    output = _run("check_cuda.sh", *architectures)
    if "skipped" in output:
        pytest.skip(output.strip())
    assert output.count("no spills") == len(architectures) and "bindings compile and link" in output
