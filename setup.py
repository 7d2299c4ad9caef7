"""Builds the compiled row kernels of `megatron_egrsd.vocab_parallel` next to it; all metadata is in pyproject.toml.

The CPU part needs a C++17 compiler and Python's headers, the CUDA part nvcc (its host compiler and the static CUDA
runtime come with it). torch is not needed: the kernels take addresses, so one build serves every torch. What cannot be
built is left out with a line that says why, here and at the first use: the package then runs in plain torch.
MEGATRON_EGRSD_BUILD=cpu leaves the CUDA part out, =none both.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = ["csrc/bind/module.cpp", "csrc/bind/divergence.cpp", *(f"csrc/cpu/{n}.cpp" for n in (
    "dispatch", "simd_avx512", "simd_avx2", "simd_portable"))]  # fmt: skip
CUDA_SOURCES = ["csrc/cuda/kernels.cu", "csrc/cuda/divergence.cu"]
CUDA_ARCHITECTURES = ("80", "90", "100")

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones would install "UNKNOWN 0.0.0" without a word
    sys.exit(f"error: setuptools 77 or newer is needed, this is {setuptools.__version__}: pip install -U setuptools")


class BuildKernels(build_ext):
    """Finds the tools when the build starts, and never fails an installation."""

    def run(self):
        missing = []
        name = self.extensions[0].name if self.extensions else ""
        try:
            missing = self._prepare(self.extensions[0])
            super().run()
        except Exception as error:  # whatever is wrong with the tools of this machine, the package works without them
            missing = [f"the kernels: {error}"]
            self.extensions = []
        if name:
            report(missing, Path(self.get_ext_fullpath(name)).with_name("_not_built.txt"))

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def _prepare(self, extension: Extension) -> list[str]:
        """Complete `extension`; return what is left out of it and why. Raises RuntimeError if nothing can be built."""
        wanted = os.environ.get("MEGATRON_EGRSD_BUILD", "")
        if wanted == "none":
            raise RuntimeError("MEGATRON_EGRSD_BUILD=none")
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            raise RuntimeError("Python's headers are missing (Debian, Ubuntu: apt-get install python3-dev)")
        extension.include_dirs = [pybind11_headers()]
        nvcc = find_nvcc()
        if wanted == "cpu":
            return ["the CUDA kernels: MEGATRON_EGRSD_BUILD=cpu"]
        if nvcc is None:
            return ["the CUDA kernels: no nvcc in CUDA_HOME, /usr/local/cuda and PATH"]
        if torch_is_for_cpu():
            return ["the CUDA kernels: torch is built for the CPU only"]
        try:
            objects = compile_cuda(nvcc, Path(self.build_temp))
        except Exception as error:
            return [f"the CUDA kernels: {error}"]
        extension.extra_objects = objects
        extension.define_macros = [("EGRSD_CUDA", "1")]
        cudart = nvcc.parents[1].glob("**/libcudart_static.a")
        extension.library_dirs = [str(path.parent) for path in cudart]
        extension.libraries = [*extension.libraries, "cudart_static", "rt"]
        return []


def report(missing: list[str], path: Path) -> None:
    """Say what was left out, now and (through the file) at the first use."""
    for line in missing:
        print(f"megatron_egrsd: not built: {line}; plain torch will be used instead", file=sys.stderr)
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(" ".join(line.split()) for line in missing) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def pybind11_headers() -> str:
    """Return the directory of pybind11's headers: its own package, or torch, which comes with a copy."""
    found = importlib.util.find_spec("pybind11")
    if found:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        ParallelCompile().install()  # the files at the same time, on every core
        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin and (Path(torch.origin).parent / "include/pybind11").exists():
        return str(Path(torch.origin).parent / "include")
    raise RuntimeError("neither pybind11 nor torch is installed where the build runs")


def torch_is_for_cpu() -> bool:
    """Return whether the installed torch has no CUDA; an isolated build sees no torch, and cannot know."""
    try:
        import torch
    except Exception:
        return False
    return torch.version.cuda is None


def find_nvcc() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").exists():
            return (Path(home) / "bin/nvcc").resolve()
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def compile_cuda(nvcc: Path, build_dir: Path) -> list[str]:
    """Compile the CUDA kernels for every architecture this nvcc knows, plus PTX for later ones; return the objects."""
    build_dir.mkdir(parents=True, exist_ok=True)
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True, timeout=60).stdout
    architectures = [a for a in CUDA_ARCHITECTURES if f"compute_{a}" in known.split()]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", *targets]

    def compiled(source: str) -> str:
        out = build_dir / f"cuda_{Path(source).stem}.o"
        subprocess.run([str(nvcc), *flags, "-c", source, "-o", str(out)], check=True, timeout=600)
        return str(out)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compiled, CUDA_SOURCES))


setup(
    ext_modules=[
        Extension(
            "megatron_egrsd.vocab_parallel._kernels",
            CPU_SOURCES,
            depends=[str(p) for p in Path("csrc").rglob("*.h")],
            extra_compile_args=[
                "-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra",
                "-Wno-maybe-uninitialized",
            ],
            libraries=["dl", "pthread"],
        )
    ]
    if platform.system() == "Linux"
    else [],
    cmdclass={"build_ext": BuildKernels},
)  # fmt: skip
