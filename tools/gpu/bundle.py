"""Build build/gpu/bundle.tar.xz: the repository, and beside it the packages that a GPU machine without network lacks.

Unpacked anywhere it is a checkout with build/gpu/site-3.12 (packages, installed), build/gpu/te-3.12 (Transformer
Engine) and build/gpu/sources (to be compiled there). tools/gpu/run.sh finds them; tools/gpu/bundle.sh calls this.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tools.gpu.fatbin import keep_architecture

BUILD = Path("build/gpu")
PYTHON = "3.12"  # of the GPU machine; run.sh takes the site of its own version alone
SITE, ENGINE = BUILD / f"site-{PYTHON}", BUILD / f"te-{PYTHON}"
SOURCES, ARCHIVE = BUILD / "sources", BUILD / "bundle.tar.xz"
BROUGHT = {SITE: Path("tools/gpu/brought.txt"), ENGINE: Path("tools/gpu/brought_te.txt")}
LIMIT = 64 << 20
ARCHITECTURE = 90  # H100, H200
SOURCE = "transformer_engine_torch==2.20.2"
# Files that nothing here uses, of the packages that would not fit else.
PRUNED = [
    "bin", "**/__pycache__", "sglang*.dist-info/RECORD", "jedi/third_party", "sglang/multimodal_gen", "sglang/test",
    "sglang/srt/rust_extensions/*.so", "sglang/srt/mem_cache/rust_tree_core/*.so", "zstandard/_cffi*.so",
    "torch_memory_saver_hook_mode_*[!3].abi3.so",
]  # fmt: skip
NOT_PACKED = ["docs/images", "tests/data", "examples/validation"]  # of the checkout
CUDA_LIBRARIES = ["transformer_engine/wheel_lib/libtransformer_engine.so", "transformer_engine/wheel_lib/libnccl_ep.so"]
# Imported from the bundle in a clean directory: by this interpreter, which has torch, what is not compiled for another
# version of Python; by Python 3.12 what is, if it needs nothing else.
WITH_TORCH = [
    "megatron.core.models.gpt", "jsonargparse", "math_verify", "pebble", "datasets",
    "liger_kernel.transformers.functional", "megatron_egrsd.rollout.launch", "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler", "sglang.srt.models.qwen3", "megatron_egrsd.cli", "megatron_egrsd.train",
    "benchmarks.check_training", "benchmarks.vocab_parallel", "tools.gpu.stages", "tools.gpu.report",
]  # fmt: skip
COMPILED = [
    "orjson", "rpds", "msgspec", "zstandard", "pybase64", "zmq", "llguidance", "jiter", "setproctitle",
]  # fmt: skip
_IMPORT = """
import importlib, os, sys
root, *modules = sys.argv[1:]
for name in modules:
    module = importlib.import_module(name)
    assert os.path.realpath(module.__file__).startswith(root), f"{name} is {module.__file__}"
"""


def main() -> None:
    for path in (SITE, ENGINE, SOURCES):
        shutil.rmtree(path, ignore_errors=True)
    for target, brought in BROUGHT.items():
        install(brought, target)
    # SGLang finds the CPU platform by the entry points; the package itself is imported from the checkout.
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(SITE)], check=True)
    fetch_source()
    prune()
    pack()
    size = ARCHIVE.stat().st_size
    print(f"{ARCHIVE}: {size / (1 << 20):.1f} MiB of {LIMIT >> 20}")
    if size > LIMIT:
        sys.exit(f"error: the bundle is {(size - LIMIT) / (1 << 20):.1f} MiB too large; shorten {BROUGHT[SITE]}")
    verify()


def install(brought: Path, target: Path) -> None:
    """Install the packages listed in a file, for the GPU machine's Python on x86-64 Linux, whatever runs here."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--no-compile",
               "--target", str(target), "--python-version", PYTHON, "--implementation", "cp", "-r", str(brought),
               *(word for abi in ("cp" + PYTHON.replace(".", ""), "abi3", "none") for word in ("--abi", abi)),
               *(word for name in platforms for word in ("--platform", name))]  # fmt: skip
    subprocess.run(command, check=True)


def fetch_source() -> None:
    """Download the source that is compiled on the GPU machine.

    pip asks a source for its metadata, and this one asks torch for its version of CUDA: a stand-in answers.
    """
    with tempfile.TemporaryDirectory() as directory:
        torch = Path(directory, "torch")
        (torch / "utils").mkdir(parents=True)
        (torch / "__init__.py").write_text(
            '__version__ = "2.11.0"\nclass version: cuda = "13.0"\nclass _C: _GLIBCXX_USE_CXX11_ABI = True\n'
        )
        (torch / "utils/__init__.py").touch()
        (torch / "utils/cpp_extension.py").write_text(
            "from setuptools import Extension as CppExtension\n"
            "from setuptools.command.build_ext import build_ext as BuildExtension\n"
        )
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary",
                   ":all:", "--dest", str(SOURCES), SOURCE]  # fmt: skip
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": directory})
    if done.returncode:
        print(f"not brought: {SOURCE}; the stages with Transformer Engine will be absent", flush=True)


def prune() -> None:
    for pattern in PRUNED:
        for path in list(SITE.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in CUDA_LIBRARIES:
        zeroed, kept = keep_architecture(ENGINE / name, ARCHITECTURE)
        print(f"{name}: {kept / 1e6:.0f} MB of sm_{ARCHITECTURE} kept, {zeroed / 1e6:.0f} MB zeroed", flush=True)


def pack() -> None:
    command = ["git", "ls-files", "-z", "--", ".", *(f":!{path}" for path in NOT_PACKED)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with tarfile.open(ARCHIVE, "w:xz", preset=6) as archive:
        for path in (*filter(None, listed.split("\0")), SITE, ENGINE, *([SOURCES] if SOURCES.exists() else [])):
            archive.add(path)


def verify() -> None:
    """Unpack the bundle elsewhere and import from it what needs no GPU. Exits if something cannot be imported."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve()
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(root, filter="data")
        site, pure = root / SITE, root / "pure"
        pure.mkdir()
        for path in site.iterdir():
            if path.name in ("megatron", "sglang") or not _compiled(path):
                (pure / path.name).symlink_to(path)
        _import(Path(sys.executable), [root, pure], root, WITH_TORCH)
        python312 = Path(os.environ.get("PYTHON312") or shutil.which("python3.12") or "")
        if python312.is_file():
            _import(python312, [site], root, COMPILED)
        else:
            print(f"not checked, for want of Python 3.12: {', '.join(COMPILED)}")


def _compiled(path: Path) -> bool:
    """Return whether an entry of the site is, or holds, a library, which may be for Python 3.12 alone, or metadata."""
    if path.suffix in (".dist-info", ".egg-info", ".so"):  # metadata tell a package where its libraries lie
        return True
    return any(path.rglob("*.so"))


def _import(python: Path, path: list[Path], root: Path, modules: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "SGLANG_PLATFORM": "megatron_egrsd_cpu"}
    done = subprocess.run([python, "-c", _IMPORT, str(root), *modules], cwd=root, env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        sys.exit(f"error: {python} cannot import the bundle:\n{done.stderr[-2000:]}")
    print(f"{python} imports {len(modules)} modules of the bundle: {', '.join(modules)}", flush=True)


if __name__ == "__main__":
    main()
