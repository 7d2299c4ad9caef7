"""Bytes move from file to file: whole, rounded once, in torch's own format, and not at all after an error."""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from megatron_egrsd.errors import RunError
from megatron_egrsd.hf import byte_ranges
from megatron_egrsd.hf.byte_ranges import Range, in_threads, pieces, reserve, write_all
from megatron_egrsd.hf.convert import ToHF, ToMegatron
from megatron_egrsd.hf.safetensors_file import SafetensorsWriter
from megatron_egrsd.hf.torch_dist_reader import TorchDistReader
from megatron_egrsd.system.interrupts import held_back
from tests.random_checkpoints import MOE, random_qwen3

BF16, FP32 = torch.bfloat16, torch.float32


def joined(*arguments) -> bytes:
    return b"".join(bytes(piece) for piece in pieces(*arguments))


def test_ranges_of_several_files_are_joined_in_order_whatever_their_size(tmp_path):
    contents = [torch.randint(0, 256, (n,), dtype=torch.uint8).numpy().tobytes() for n in (700_000, 3_000_001)]
    for name, content in zip("ab", contents, strict=True):
        (tmp_path / name).write_bytes(content)
    wanted = [(0, 10, 600_000), (1, 1, 2), (0, 0, 10), (1, 99, 2_900_000)]
    ranges = [Range(tmp_path / "ab"[file], offset, nbytes) for file, offset, nbytes in wanted]
    assert joined(ranges, BF16, BF16) == b"".join(contents[f][o : o + n] for f, o, n in wanted)
    sizes = [len(piece) for piece in pieces(ranges, BF16, BF16)]
    assert set(sizes[:-1]) == {2 * byte_ranges.PIECE_ELEMENTS}


@pytest.mark.parametrize(("stored", "wanted"), [(FP32, BF16), (BF16, FP32), (FP32, torch.float16)])
def test_a_type_change_rounds_as_torch_does(stored, wanted, tmp_path):
    values = torch.randn(byte_ranges.PIECE_ELEMENTS + 77).to(stored)
    (tmp_path / "file").write_bytes(byte_ranges.raw_bytes(values))
    found = joined([Range(tmp_path / "file", 0, values.nbytes)], stored, wanted)
    assert found == bytes(byte_ranges.raw_bytes(values.to(wanted)))


def test_a_file_that_ends_too_early_is_named(tmp_path):
    (tmp_path / "short").write_bytes(b"12345678")
    with pytest.raises(RunError, match="short is truncated: it ends before byte 10"):
        joined([Range(tmp_path / "short", 2, 8)], BF16, BF16)


def test_a_write_that_stops_short_is_continued():
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(data[:1000])

    file, data = Slow(), bytes(range(256)) * 20
    write_all(file, data)
    assert file.getvalue() == data


def test_reserved_space_is_allocated_but_not_in_the_size(tmp_path):
    with open(tmp_path / "file", "wb", buffering=0) as file:
        reserve(file, 1 << 20)
        found = os.fstat(file.fileno())
        assert found.st_size == 0 and found.st_blocks * 512 >= 1 << 20
        with pytest.raises(OSError, match=r"too large|No space"):
            reserve(file, 1 << 62)


def test_where_space_cannot_be_reserved_nothing_happens():
    with open("/dev/null", "wb", buffering=0) as file:
        reserve(file, 1 << 20)


def test_an_export_takes_its_tensors_in_any_order_but_each_once(tmp_path):
    tensors = {name: torch.randn(3, n) for n, name in enumerate("abcde", start=1)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(tmp_path, shapes, FP32, shard_bytes=100)
    for name in "daec":
        writer.write(name, tensors[name])
    for name in "dx":
        with pytest.raises(RunError, match=f"should write b now, but was given {name}"):
            writer.write(name, tensors["d"])
    with pytest.raises(RunError, match="2 bytes too few of b"):
        writer.write_pieces("b", [memoryview(bytes(22))])
    with pytest.raises(RunError, match="ended before b"):
        writer.finish()
    writer.write("b", tensors["b"])
    writer.finish()
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(weight_map) == list(shapes) and len(set(weight_map.values())) == 3
    for name, file in weight_map.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


@pytest.mark.timeout(30)
@pytest.mark.parametrize("error", [RunError("the third"), KeyboardInterrupt()])
def test_after_an_error_the_other_threads_end_at_their_next_step(error):
    """Without the error the other threads would never end; KeyboardInterrupt stands for one in the waiting thread."""
    begun, done, threads = threading.Barrier(2), [], threading.active_count()

    def endless():
        begun.wait()
        while True:
            yield 1

    def failing():
        begun.wait()
        yield 1
        raise error

    with pytest.raises(type(error)):
        in_threads([endless(), failing(), endless()], done.append)
    assert done and threading.active_count() == threads


INTERRUPTED = """
import random, signal, time
from megatron_egrsd.hf.byte_ranges import in_threads

def task():
    for _ in range(3):
        time.sleep(0.0005)
        yield 1

interrupts, moments = 0, random.Random(1)
signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
for _ in range(2000):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 4e-3))
            in_threads([task() for _ in range(8)], lambda nbytes: None)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
print(interrupts)
"""


@pytest.mark.heavy
def test_an_interruption_at_any_moment_ends_the_work():
    """In a plain pool of threads some of 300 leave a lock taken, for which the pool waits without end."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 1000


def test_after_a_first_interruption_is_held_back_a_second_one_ends_the_block():
    stops = []
    with pytest.raises(KeyboardInterrupt), held_back(lambda: stops.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert stops == [1]
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was held back as well")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_that_another_handler_keeps_stops_nothing():
    """That of a run in training, which finishes its step: a half-written export must not look finished."""
    kept, stops = [], []
    before = signal.signal(signal.SIGINT, lambda number, frame: kept.append(number))
    try:
        with held_back(lambda: stops.append(1)):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert kept == [signal.SIGINT] and not stops


def test_every_chunk_is_an_archive_that_torch_reads(tmp_path):
    source = random_qwen3(tmp_path / "hf", base=MOE)
    ToMegatron(source, tmp_path / "megatron").run()
    weights = load_file(source / "model.safetensors")
    reader = TorchDistReader(tmp_path / "megatron" / "release")
    for key, stored in reader.tensors.items():
        for chunk in stored.chunks:
            content = (reader.directory / chunk.file).read_bytes()[chunk.start : chunk.start + chunk.length]
            tensor = torch.load(io.BytesIO(content), weights_only=True)
            assert (tuple(tensor.shape), tensor.dtype) == (chunk.sizes, BF16)
            if key == "decoder.layers.self_attention.linear_proj.weight":
                expected = weights[f"model.layers.{chunk.offsets[0]}.self_attn.o_proj.weight"]
                assert torch.equal(tensor[0].view(torch.int16), expected.view(torch.int16))


def test_truncated_and_foreign_chunks_end_an_export_with_nothing_written(tmp_path):
    source = random_qwen3(tmp_path / "hf")
    ToMegatron(source, tmp_path / "megatron").run()
    data = tmp_path / "megatron" / "release" / "__0_1.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"decoder\..*__0_1.distcp.*truncated or damaged"):
        ToHF(tmp_path / "megatron", tmp_path / "again").run()
    data.write_bytes(b"\0" * len(content))
    with pytest.raises(RunError, match=r"decoder\..*__0_1.distcp.*truncated or damaged"):
        ToHF(tmp_path / "megatron", tmp_path / "again").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]
