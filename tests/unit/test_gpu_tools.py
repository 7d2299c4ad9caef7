"""tools/gpu without a GPU: the page of its results, the list of stages in the guide, the bundle's contents."""

import importlib.metadata
import re
import struct
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tools.gpu import bundle, fatbin, loop, report, results
from tools.gpu.stages import stages

ROOT = Path(__file__).parents[2]


def _entry(kind, architecture, payload):
    header = struct.pack("<HHIQ12xI", kind, 0x101, 64, len(payload), architecture).ljust(64, b"\1")
    return header + payload


def _container(*entries):
    content = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def _library():
    first = _container(_entry(2, 80, b"a" * 40), _entry(2, 90, b"b" * 48), _entry(1, 90, b"p" * 24))
    second = _container(_entry(2, 100, b"c" * 16), _entry(2, 90, b"d" * 8))
    chance = struct.pack("<I", 0xBA55ED50) + b"no container at all"
    return b"ELF" + first + b"between" + chance + second + struct.pack("<I", 0xBA55ED50)


def test_one_architecture_is_kept_and_nothing_moves(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(_library())
    assert fatbin.keep_architecture(path, 90) == (40 + 24 + 16, 48 + 8)
    expected = _library()
    for code in (b"a" * 40, b"p" * 24, b"c" * 16):
        expected = expected.replace(code, bytes(len(code)))
    assert path.read_bytes() == expected


def test_a_library_without_the_architecture_is_left_alone(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(_library())
    with pytest.raises(ValueError, match="no code for sm_75"):
        fatbin.keep_architecture(path, 75)
    assert path.read_bytes() == _library()
    (tmp_path / "plain.so").write_bytes(b"no CUDA in here")
    assert fatbin.keep_architecture(tmp_path / "plain.so", 90) == (0, 0)


def test_the_page_names_the_device_the_states_and_the_complaints(tmp_path):
    machine = {"device": "NVIDIA H200", "torch": "2.11.0+cu130", "python": "3.12.3"}
    rows = [
        {"table": "forward", "entry": "ours", "share_of_floor": 0.8123, "complaint": "below 0.85 of the floor"},
        {"table": "forward", "entry": "eager", "share_of_floor": 0.05},
        {"table": "LM head", "entry": "chunks", "log_prob_error": None},
    ]
    content = {"begun": "2027-01-02T03:04:05+00:00", "state": "timed out", "reason": "its limit is 300 s",
               "seconds": 300.2, "rows": rows, **machine}  # fmt: skip
    results.write(tmp_path, "kernel-speed", content)
    text = report.page(tmp_path)
    assert "Measured on 2027-01-02: NVIDIA H200, torch 2.11.0+cu130, Python 3.12.3." in text
    assert report.NEVER not in text
    assert re.search(r"\| kernel-speed \|.*\| timed out \| 300 \| its limit is 300 s \|", text)
    assert re.search(r"\| fp8 \|.*\| not begun \| - \|", text)
    assert "| ours | 0.812 | below 0.85 of the floor |\n| eager | 0.05 | - |" in text
    assert "**LM head**" in text and "| chunks | - |" in text
    results.write(tmp_path, "kernel-speed", content | {"device": "CPU"})
    assert report.NEVER in report.page(tmp_path)  # a rehearsal proves nothing about a GPU


def test_without_results_the_committed_page_says_that_nothing_has_run(tmp_path):
    committed = (ROOT / "docs/measurements/gpu.md").read_text(encoding="utf-8")
    assert committed == report.page(tmp_path) or report.NEVER not in committed


def test_a_result_is_complete_at_every_moment_and_a_stage_by_hand_only_prints(tmp_path, monkeypatch, capsys):
    results.write(tmp_path, "s", {"state": "running", "rows": []})
    monkeypatch.setenv(results.RESULT_VARIABLE, str(tmp_path / "s.json"))
    results.record("t", a=1)
    results.record("t", a=2, complaint="slow")
    assert results.read(tmp_path, "s")["rows"] == [{"table": "t", "a": 1}, {"table": "t", "a": 2, "complaint": "slow"}]
    monkeypatch.delenv(results.RESULT_VARIABLE)
    results.record("t", a=3)
    assert len(results.read(tmp_path, "s")["rows"]) == 2 and "{'a': 3}" in capsys.readouterr().out


def test_the_guide_lists_every_stage_with_its_limit(monkeypatch):
    monkeypatch.delenv("DEVICE", raising=False)
    guide = (ROOT / "docs/guides/gpu.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \| (\d+) s \|", guide, re.M) == [(s.name, f"{s.seconds:.0f}") for s in stages()]
    for stage in stages():
        _, flag, module, *_ = stage.command
        assert flag == "-m" and (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


def _name(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0].lower())


def _pins(path):
    lines = (line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines())
    return {_name(line): line.partition("==")[2] for line in lines if line and not line.startswith("#")}


def test_the_limit_of_the_loop_holds_all_its_attempts(monkeypatch):
    monkeypatch.delenv("DEVICE", raising=False)
    (limit,) = (stage.seconds for stage in stages() if stage.name == "loop")
    assert limit >= (len(loop.ATTEMPTS) + 1) * loop.SECONDS + 30  # one more with a server on the CPU; the imports


def test_the_environment_of_a_gpu_machine_has_all_that_training_imports():
    """Also where the project is installed with --no-deps, as in the Dockerfile."""
    gpu, cpu = _pins("requirements/gpu.txt"), _pins("requirements/cpu.txt")
    assert all(gpu.values()), "a line is not pinned"
    assert {n: v for n, v in gpu.items() if n != "torch"} == {n: cpu.get(n) for n in gpu if n != "torch"}
    sglang = {_name(line) for line in importlib.metadata.requires("sglang") if "extra ==" not in line}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {_name(line) for line in extra["train"]} - gpu.keys() - sglang == set()


def test_the_bundle_brings_the_versions_of_the_pinned_environment():
    (*brought,) = map(_pins, bundle.BROUGHT.values())
    brought, pinned = brought[0] | brought[1], _pins("requirements/cpu.txt")
    assert len(brought) > 50
    assert {n: v for n, v in brought.items() if n in pinned} == {n: pinned[n] for n in brought if n in pinned}


def test_the_stand_in_for_sglangs_kernels_computes_what_qwen3_needs_and_refuses_the_rest(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools/gpu/standin"))
    import sgl_kernel
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    try:
        generator = torch.Generator().manual_seed(0)
        x, residual = torch.randn(2, 5, 64, generator=generator)
        weight = torch.rand(64, generator=generator)
        expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
        torch.testing.assert_close(sgl_kernel.rmsnorm(x, weight, 1e-6), expected)
        torch.testing.assert_close(sgl_kernel.rmsnorm(x, weight, 1e-6, out=torch.empty_like(x)), expected)
        both, total = x.clone(), residual.clone()
        sgl_kernel.fused_add_rmsnorm(both, total, weight, 1e-6)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(both, torch.nn.functional.rms_norm(x + residual, (64,), weight, 1e-6))
        gated = torch.nn.functional.silu(x[:, :32]) * x[:, 32:]
        torch.testing.assert_close(sgl_kernel.silu_and_mul(x, out=torch.empty(5, 32)), gated)
        assert sgl_kernel.scalar_type.scalar_types.uint4b8  # read while modules are imported
        with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache was called"):
            flash_attn_with_kvcache()
    finally:  # other tests in this process look for the real one
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "sgl_kernel"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
