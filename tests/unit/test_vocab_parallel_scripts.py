"""The compiled parts' own checks as tests: sanitizers over the CPU core, the CUDA part without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).parents[2]


def _run(script: str) -> str:
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run([ROOT / "tools" / script], env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.slow
def test_sanitizers_find_nothing_in_the_cpu_core():
    assert _run("check_sanitizers.sh").count(": ok") == 4


def test_cuda_kernels_compile_for_every_architecture():
    output = _run("check_cuda.sh")
    if "skipped" in output:
        pytest.skip(output.strip())
    assert output.count("no spills") == 3 and "bindings compile and link" in output
