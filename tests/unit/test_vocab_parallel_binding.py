"""The compiled kernels as seen from outside: mutation that autograd is told of, files that do not load, packaging."""

import ast
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from megatron_egrsd.vocab_parallel import kernels, log_prob_and_entropy, masked_log_prob, ops
from megatron_egrsd.vocab_parallel.kernels import INTERFACE
from tests.unit.test_vocab_parallel import CUDA, use

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "megatron_egrsd" / "vocab_parallel"
MODIFIED = "modified by an inplace operation"


@pytest.fixture(params=["compiled", "plain torch", CUDA])
def implementation(request, monkeypatch):
    use(request.param, monkeypatch)


def overwriting(logits, target):
    return log_prob_and_entropy(logits, target, inplace_backward=True)[0]


@pytest.mark.parametrize("rows", [lambda x: x, lambda x: x[:, :-1], lambda x: x.transpose(0, 1)])
def test_a_second_backward_pass_over_overwritten_logits_raises(implementation, rows):
    logits = rows(torch.randn(3, 4, 50, requires_grad=True) * 1)
    log_prob = overwriting(logits, torch.randint(0, 50, logits.shape[:-1]))
    log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        log_prob.sum().backward()


def test_a_second_consumer_of_overwritten_logits_raises(implementation):
    logits = torch.randn(4, 50, requires_grad=True) * 1
    other = logits.square().sum()
    overwriting(logits, torch.arange(4)).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        other.backward()


def test_a_second_backward_pass_of_a_masked_log_prob_raises(implementation):
    logits = torch.randn(4, 50, requires_grad=True)
    log_prob = masked_log_prob(logits, torch.rand(4, 50) < 0.5, torch.arange(4))
    log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        log_prob.sum().backward()


@pytest.mark.skipif(not kernels.available(torch.device("cpu")), reason="the kernels are not built")
def test_a_kernel_that_does_not_tell_autograd_is_found(monkeypatch):
    """The tests above prove something only if they fail without the bump of the version counter."""
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensor: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_second_backward_pass_over_overwritten_logits_raises(None, lambda x: x)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_second_consumer_of_overwritten_logits_raises(None)


def copy_of_the_room(directory: Path) -> Path:
    """Copy the package with nothing compiled in it; return the folder of vocab_parallel."""
    room = directory / "megatron_egrsd" / "vocab_parallel"
    shutil.copytree(ROOM, room, ignore=shutil.ignore_patterns("*.so", "_not_built.txt", "__pycache__"))
    shutil.copy(ROOT / "megatron_egrsd" / "__init__.py", room.parent)
    return room


UNLOADABLE = {
    "nothing built": (lambda room: None, "(not built)"),
    "setup.py said why": (
        lambda room: (room / "_not_built.txt").write_text("the kernels: no g++\n"),
        "not built: the kernels: no g++",
    ),
    "truncated": (lambda room: compiled_file(room).write_bytes(b"\x7fELF"), "built, but not loaded: "),
    "no library": (lambda room: compiled_file(room).write_text("not a library"), "built, but not loaded: "),
    "other sources": (
        lambda room: (room / "_kernels.py").write_text(f"interface = {INTERFACE + 1}"),
        "was built from another version of the sources",
    ),
}


def compiled_file(room: Path) -> Path:
    return room / f"_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"


# A copy of the process for each root, so that torch is imported once.
USE_THREE_TIMES = """
import json, os, sys, torch, warnings
for root in sys.argv[1:]:
    if os.fork() == 0:
        sys.path.insert(0, root)
        from megatron_egrsd.vocab_parallel import log_prob_and_entropy
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(3):
                value = log_prob_and_entropy(torch.zeros(1, 5), torch.tensor([0]))[0]
        assert abs(value.item() + torch.tensor(5.0).log().item()) < 1e-6
        print(json.dumps([str(warning.message) for warning in warned]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def warned(tmp_path_factory):
    """The warnings of using the package three times, for each of UNLOADABLE."""
    roots = {case: tmp_path_factory.mktemp("unloadable") for case in UNLOADABLE}
    for case, root in roots.items():
        UNLOADABLE[case][0](copy_of_the_room(root))
    command = [sys.executable, "-c", USE_THREE_TIMES, *map(str, roots.values())]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(roots, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.heavy
@pytest.mark.parametrize("case", UNLOADABLE)
def test_a_file_that_does_not_load_is_a_warning_with_the_reason(case, warned):
    """The package runs in plain torch, and says once why."""
    (message,) = warned[case]
    assert UNLOADABLE[case][1] in message


def test_no_tensor_of_another_kind_reaches_an_address():
    """The kernels see addresses only, so these checks are all there is between a caller and foreign memory."""
    if not kernels.available(torch.device("cpu")):
        pytest.skip("the kernels are not built")
    logits, target = torch.randn(3, 8), torch.tensor([0, 1, 2])
    part = ops.statistics(logits, target, ops.Shard(0, 8, 8, 8, None, 1), 1.0)
    shard = ops.Shard(0, 8, 8, 8, None, 1)
    one = torch.ones(3)
    bad = [
        lambda: kernels.statistics(logits.double(), target, shard, 1.0),
        lambda: kernels.statistics(logits.t(), target, shard, 1.0),
        lambda: kernels.statistics(logits, target.int(), shard, 1.0),
        lambda: kernels.statistics(logits, target[:2], shard, 1.0),
        lambda: kernels.statistics(logits, torch.arange(6)[::2], shard, 1.0),
        lambda: kernels.statistics(logits, target, ops.Shard(0, 9, 9, 9, None, 1), 1.0),
        lambda: kernels.statistics(logits, target, shard, torch.ones(2)),
        lambda: kernels.combine(part.double()[None]),
        lambda: kernels.logits_grad(logits, target, part[:2], ops.Gradients(one), shard, 1.0, inplace=False),
        lambda: kernels.logits_grad(logits, target, part, ops.Gradients(one.half()), shard, 1.0, inplace=False),
        lambda: kernels.logits_grad(logits, target, part, ops.Gradients(one, one[:2]), shard, 1.0, inplace=False),
        lambda: kernels.logits_grad(logits.to("meta"), target, part, ops.Gradients(one), shard, 1.0, inplace=False),
    ]
    for call in bad:
        with pytest.raises(ValueError):
            call()


def test_the_loss_alone_needs_torch_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [d.partition(">")[0] for d in project["dependencies"]] == ["torch"]
    assert project["requires-python"] == ">=3.10"
    for file in [*ROOM.rglob("*.py"), ROOT / "megatron_egrsd" / "__init__.py", ROOT / "setup.py"]:
        ast.parse(file.read_text(), feature_version=(3, 10))


@pytest.mark.heavy
def test_setup_says_in_one_line_why_there_are_no_kernels(tmp_path):
    environment = os.environ | {"MEGATRON_EGRSD_BUILD": "none"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    line = "the kernels: MEGATRON_EGRSD_BUILD=none"
    assert done.returncode == 0
    assert [x for x in done.stderr.splitlines() if x.startswith("megatron_egrsd: not built: ")] == [
        f"megatron_egrsd: not built: {line}; plain torch will be used instead"
    ]
    (file,) = tmp_path.rglob("_not_built.txt")
    assert file.read_text() == line + "\n"
