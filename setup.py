"""Builds the compiled row kernels of `megatron_egrsd.vocab_parallel` next to it; all metadata is in pyproject.toml.

The CPU part needs a C++17 compiler, the CUDA part nvcc (its host compiler and the static CUDA runtime come with it).
What cannot be built is left out with a warning: the package then runs in plain torch. torch must be installed already
(`pip install --no-build-isolation -e .`). MEGATRON_EGRSD_BUILD=cpu leaves the CUDA part out, =none both.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = ["csrc/bind/ops.cpp", *(f"csrc/cpu/{n}.cpp" for n in (
    "dispatch", "simd_avx512", "simd_avx2", "simd_portable"))]  # fmt: skip
CUDA_ARCHITECTURES = ("80", "90", "100")
# torch 2.11: the oldest whose stable ABI has all we call
TARGET_TORCH = "0x020b000000000000"


class BuildKernels(build_ext):
    """Adds torch's paths (and the CUDA objects) when the build starts, and never fails an installation."""

    def run(self):
        try:
            self._prepare(self.extensions[0])
            super().run()
        except Exception as error:  # whatever is wrong with the tools of this machine, the package works without them
            print(f"warning: kernels not built, plain torch will be used instead: {error}", file=sys.stderr)
            self.extensions = []

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def _prepare(self, extension: Extension) -> None:
        if os.environ.get("MEGATRON_EGRSD_BUILD") == "none":
            raise RuntimeError("MEGATRON_EGRSD_BUILD=none")
        import torch

        root = Path(torch.__file__).parent
        extension.extra_compile_args += ["-isystem", str(root / "include")]
        extension.library_dirs = [str(root / "lib")]
        extension.libraries = ["torch", "torch_cpu", "c10"]
        extension.runtime_library_dirs = []  # torch is loaded before the kernels are
        nvcc = find_nvcc()
        if nvcc and torch.version.cuda and os.environ.get("MEGATRON_EGRSD_BUILD") != "cpu":
            extension.extra_objects = [compile_cuda(nvcc, Path(self.build_temp))]
            extension.sources = [*CPU_SOURCES, "csrc/bind/ops_cuda.cpp"]
            cudart = nvcc.parents[1].glob("**/libcudart_static.a")
            extension.library_dirs += [str(path.parent) for path in cudart]
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]


def find_nvcc() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").exists():
            return (Path(home) / "bin/nvcc").resolve()
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def compile_cuda(nvcc: Path, build_dir: Path) -> str:
    """Compile the CUDA kernels for every architecture this nvcc knows, plus PTX for later ones."""
    build_dir.mkdir(parents=True, exist_ok=True)
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True, timeout=60).stdout
    architectures = [a for a in CUDA_ARCHITECTURES if f"compute_{a}" in known.split()]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    out = build_dir / "cuda_kernels.o"
    command = [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC", *targets, "-c", "csrc/cuda/kernels.cu", "-o", out]
    subprocess.run([str(x) for x in command], check=True, timeout=600)
    return str(out)


setup(
    ext_modules=[
        Extension(
            "megatron_egrsd.vocab_parallel._C",
            CPU_SOURCES,
            depends=[str(p) for p in Path("csrc").rglob("*.h")],
            extra_compile_args=[
                "-std=c++17", "-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-maybe-uninitialized",
                f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
            ],
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
        )
    ]
    if platform.system() == "Linux"
    else [],
    cmdclass={"build_ext": BuildKernels},
)  # fmt: skip
