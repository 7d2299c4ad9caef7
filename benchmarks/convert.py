"""How fast and how lean conversion is, against `cp` of the same bytes in the same run.

    python -m benchmarks.convert                 # a 0.6B-shaped model in bf16, both ways and verify
    python -m benchmarks.convert --memory        # peak anonymous memory of models of 4 to 32 layers
    python -m benchmarks.convert --copies        # ways to copy the same bytes in Python, and their SHA-256

Every measurement runs in a fresh process. Anonymous memory is what the process allocates itself (VmRSS without the
pages of mapped files, which the kernel can drop at any time); the number includes Python and torch.
"""

import argparse
import functools
import hashlib
import json
import mmap
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.measure import Peak, in_turn, load, table

PIECE = bytes(1 << 19)
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", "vocab_size": 151936,
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
CONVERSIONS = {"to-megatron": ("hf", "megatron"), "to-hf": ("megatron", "again"), "verify": ("hf", "megatron")}


def make_model(path: Path, *, trainable: bool = False, **changes) -> int:
    """Write random bf16 weights of that shape to `path`; returns their bytes.

    They are all values of bf16, nan and infinities among them; small ones if the model is to be `trainable`.
    """
    import torch

    from megatron_egrsd.hf.architecture import Architecture
    from megatron_egrsd.hf.mapping import hf_shapes
    from megatron_egrsd.hf.safetensors_file import SafetensorsWriter

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(QWEN3_06B | changes))
    shapes = hf_shapes(Architecture.from_pretrained(path))
    writer = SafetensorsWriter(path, shapes, torch.bfloat16)
    for seed, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(seed)
        if trainable:
            weights = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        else:
            weights = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
        writer.write(name, weights)
    writer.finish()
    return size(path, "*.safetensors")


def size(directory: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in directory.rglob(pattern) if file.is_file())


def measured(action: str, directory: Path) -> dict:
    """Convert in a fresh process; return seconds, of the clock and of the processors, and peak anonymous bytes."""
    source, target = (directory / name for name in CONVERSIONS[action])
    with multiprocessing.get_context("spawn").Pool(1) as process:  # ended with the block, also after a timeout
        return process.apply_async(convert, (action, source, target)).get(900)


def convert(action: str, source: Path, target: Path) -> dict:
    """Run one conversion here and return what `measured` does; imports are not counted."""
    import torch

    from megatron_egrsd.hf.convert import ToHF, ToMegatron
    from megatron_egrsd.hf.verify import verify

    torch.set_num_threads(1)
    with Peak() as peak:
        warm(target.parent, size(source))
        start, busy = time.perf_counter(), time.process_time()
        if action == "to-megatron":
            ToMegatron(source, target).run()
        elif action == "to-hf":
            ToHF(source, target).run()
        else:
            assert not verify(source, target)["problems"]
        result = {"seconds": time.perf_counter() - start, "busy": time.process_time() - busy}
    return result | {"peak": peak.bytes}


def warm(directory: Path, nbytes: int) -> None:
    """Write and remove a file of `nbytes`, so that the page cache has memory at hand.

    A virtual machine gives free memory back to its host, and to get a page again takes longer than to copy one. It
    meets large writes first; cp makes small ones. With this the copy is measured, for both, and not the host.
    """
    with open(directory / "scratch", "wb", buffering=0) as file:
        for _ in range(nbytes >> 19):
            file.write(PIECE)
    (directory / "scratch").unlink()


def copied(source: Path, target: Path) -> dict:
    """Copy the weights with `cp`; return the same numbers."""
    files = [str(file) for file in source.glob("*.safetensors")]
    target.mkdir()
    warm(target.parent, size(source, "*.safetensors"))
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", *files, str(target)], check=True)
    seconds, after = time.perf_counter() - start, os.times()
    shutil.rmtree(target)
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "busy": busy, "peak": 0}


def throughput(directory: Path, repeats: int) -> None:
    """Run cp and the conversions in turns, each with no writes pending; print the medians and their ratio."""
    nbytes = make_model(directory / "hf")
    results: dict[str, list[dict]] = {name: [] for name in ("cp", *CONVERSIONS)}
    for _ in range(repeats):
        os.sync()
        results["cp"].append(copied(directory / "hf", directory / "copy"))
        for action in CONVERSIONS:
            os.sync()
            results[action].append(measured(action, directory))
        for name in ("megatron", "again"):
            shutil.rmtree(directory / name)
    cp, rows = median(result["seconds"] for result in results["cp"]), []
    for name, runs in results.items():
        seconds, busy, peaks = ([run[key] for run in runs] for key in ("seconds", "busy", "peak"))
        middle, peak = median(seconds), f"{max(peaks) / 1e9:.2f}" if any(peaks) else ""
        spread = f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
        rows.append([name, spread, f"{nbytes / 1e9 / middle:.2f}", f"{cp / middle:.2f}", f"{median(busy):.2f}", peak])
    print(f"{nbytes / 1e9:.2f} GB of bf16, median of {repeats} runs, {load()}\n")
    print(table(["", "seconds", "GB/s", "ratio to cp", "processor seconds", "peak anonymous GB"], rows))


def copies(directory: Path, repeats: int) -> None:
    """Copy one file in turns: through a buffer that is reused, from a mapping, through fresh buffers."""
    from megatron_egrsd.hf.byte_ranges import reserve

    make_model(directory / "hf")
    source, target = directory / "hf" / "model.safetensors", directory / "copy"
    nbytes, piece, large = source.stat().st_size, bytearray(1 << 19), 64 << 20

    def reused(read, write):
        view = memoryview(piece)
        while count := read.readinto(view):
            write.write(view[:count])

    def reserved(read, write):
        reserve(write, nbytes)
        reused(read, write)

    def mapped(read, write):
        with mmap.mmap(read.fileno(), 0, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as view:
            for start in range(0, nbytes, large):
                write.write(view[start : start + large])

    def fresh(read, write):
        while data := read.read(large):
            write.write(data)

    def hashed(read, write):
        hashlib.file_digest(read, "sha256")

    ways = {"512 KiB buffer, reused": reused, "the same, space reserved": reserved, "mapped file": mapped,
            "a fresh 64 MiB buffer a write": fresh, "SHA-256, nothing written": hashed}  # fmt: skip

    def run(way) -> float:
        os.sync()
        warm(directory, nbytes)
        start = time.perf_counter()
        with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
            way(read, write)
        seconds = time.perf_counter() - start
        target.unlink()
        return seconds

    def cp() -> float:
        os.sync()
        return copied(directory / "hf", target)["seconds"]

    each = {"cp": cp} | {name: functools.partial(run, way) for name, way in ways.items()}
    rates = {
        name: [nbytes / 1e9 / seconds for seconds in found]
        for name, found in in_turn(each, repeats, clock=lambda function: function()).items()
    }
    print(f"{nbytes / 1e9:.2f} GB, median of {repeats} runs, {load()}\n")
    rows = ([name, f"{median(found):.2f} ({min(found):.2f}-{max(found):.2f})"] for name, found in rates.items())
    print(table(["", "GB/s"], rows))


def memory(directory: Path) -> None:
    """Print peak anonymous memory against depth, at a vocabulary small enough that the layers decide."""
    rows = []
    for layers in (4, 8, 16, 32):
        root = directory / str(layers)
        nbytes = make_model(root / "hf", num_hidden_layers=layers, vocab_size=32000)
        peaks = [measured(action, root)["peak"] for action in CONVERSIONS]
        rows.append([layers, f"{nbytes / 1e9:.2f}", *(f"{peak / 1e9:.3f}" for peak in peaks)])
        shutil.rmtree(root)
    print(table(["layers", "weights GB", *(f"{action} GB" for action in CONVERSIONS)], rows))


def main() -> None:
    """Parse the arguments and run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="peak memory against depth instead of throughput")
    parser.add_argument("--copies", action="store_true", help="ways to copy a file instead of conversions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="convert-") as directory:
        if arguments.memory:
            memory(Path(directory))
        elif arguments.copies:
            copies(Path(directory), arguments.repeats)
        else:
            throughput(Path(directory), arguments.repeats)


if __name__ == "__main__":
    main()
