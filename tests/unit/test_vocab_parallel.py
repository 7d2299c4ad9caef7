"""The vocab-parallel kernels against fp64 on one shard: values, gradients, hard rows, bad input."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd.vocab_parallel import linear_log_prob_and_entropy, log_prob_and_entropy, log_ratio, ops, reference
from megatron_egrsd.vocab_parallel.kernels import instruction_set as own_instruction_set
from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX, Shard
from tests import cuda_on_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUDA = pytest.param("CUDA", marks=pytest.mark.heavy)  # compiled for the CPU by the test
IMPLEMENTATIONS = ["compiled", "plain torch", CUDA]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    """Run the test with the compiled kernels, with their stand-in, and with the CUDA ones (tests/cuda_on_cpu)."""
    use(request.param, monkeypatch)
    return request.param


def use(implementation: str, monkeypatch: pytest.MonkeyPatch, kernels: cuda_on_cpu.Kernels | None = None) -> None:
    if implementation == "plain torch":
        monkeypatch.setattr(ops, "compiled", lambda device: False)
    elif implementation == "compiled" and not ops.compiled(torch.device("cpu")):
        pytest.skip("the kernels are not built on this machine")
    elif implementation == "CUDA":
        if not cuda_on_cpu.compiler():
            pytest.skip("needs a C++ compiler")
        kernels = kernels or cuda_on_cpu.Kernels(cuda_on_cpu.library())
        for name in ("statistics", "combine", "logits_grad"):
            monkeypatch.setattr(ops, name, getattr(kernels, name))


def fp64(logits, target, vocab_size=None, temperature=1.0, grad_log_prob=None, grad_entropy=None):
    """Compute (log_prob, entropy, gradient of the logits) by definition, in fp64; ignored rows are zero."""
    logits = logits.detach()
    valid = logits[..., :vocab_size].double().requires_grad_()
    log_p = (valid / temperature).log_softmax(-1)
    kept = target != IGNORE_INDEX
    log_prob = log_p.gather(-1, target.clamp_min(0)[..., None])[..., 0]
    entropy = -(log_p.exp() * torch.where(log_p == -math.inf, 0.0, log_p)).sum(-1)
    log_prob, entropy = torch.where(kept, log_prob, 0.0), torch.where(kept, entropy, 0.0)
    if grad_log_prob is None:
        return log_prob.detach(), entropy.detach(), None
    loss = (log_prob * grad_log_prob).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy).sum()
    loss.backward()
    gradient = torch.zeros_like(logits, dtype=torch.float64)
    gradient[..., :vocab_size] = valid.grad
    return log_prob.detach(), entropy.detach(), gradient


def hard_rows(vocab: int, rows: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, vocab, generator=g)
    one_hot = torch.full((rows, vocab), -30.0)
    one_hot[torch.arange(rows), torch.randint(0, vocab, (rows,), generator=g)] = 30.0
    near = normal.clone()
    near[:, vocab // 2] = 25.0
    masked = torch.where(torch.rand(rows, vocab, generator=g) < 0.7, -math.inf, normal * 3)
    masked[:, vocab // 3] = 1.0
    late = normal.sort(-1).values * 40  # every block rises above all before it
    return {
        "random": normal * 3,
        "flat": normal * 0.01,
        "all negative": -normal.abs() * 5 - 40,
        "offset 100": normal + 100,
        "offset -100": normal - 100,
        "constant": torch.full((rows, vocab), 7.25),
        "zeros": torch.zeros(rows, vocab),
        "one-hot": one_hot,
        "range 1e4": normal * 1e4,
        "masked": masked,
        "near-deterministic": near,
        "rising": late,
    }


def assert_values(log_prob, entropy, expected_log_prob, expected_entropy, where):
    """Check log-probs within 1e-5 or 1e-6 relative (-inf exactly), entropies within 5e-6 and never negative."""
    unreachable = expected_log_prob == -math.inf
    assert torch.equal(log_prob == -math.inf, unreachable), f"{where}: log-prob -inf where it should not be, or not"
    error = (log_prob.double() - expected_log_prob).abs().masked_fill(unreachable, 0.0)
    allowed = torch.clamp(1e-6 * expected_log_prob.abs(), min=1e-5)
    assert bool((error <= allowed).all()), f"{where}: log-prob off by {error}"
    assert bool((entropy >= 0).all()), f"{where}: negative entropy"
    error = (entropy.double() - expected_entropy).abs()
    assert bool((error <= 5e-6).all()), f"{where}: entropy off by {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 63, 2049, 32001])
def test_values_on_hard_rows(implementation, dtype, vocab):
    for name, rows in hard_rows(vocab).items():
        if dtype == torch.float16 and name == "range 1e4":
            rows = rows.clamp(-6e4, 6e4)
        logits = rows.to(dtype)
        best = logits.argmax(-1)
        for target in (best, torch.randint(0, vocab, best.shape)):
            assert_values(*log_prob_and_entropy(logits, target), *fp64(logits, target)[:2], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient_on_hard_rows(implementation, dtype, with_entropy):
    vocab = 4099
    for name, rows in hard_rows(vocab).items():
        if dtype == torch.float16 and name == "range 1e4":
            rows = rows.clamp(-6e4, 6e4)
        logits = rows.to(dtype)
        if name == "masked":
            logits = logits.clamp_min(torch.finfo(dtype).min)  # fp64 autograd has no gradient through -inf
        target = torch.where(torch.arange(6) % 2 == 0, logits.argmax(-1), torch.randint(0, vocab, (6,)))
        g, h = torch.randn(6), torch.randn(6)
        leaf = logits.clone().requires_grad_()
        log_prob, entropy = log_prob_and_entropy(leaf, target, entropy_grad=with_entropy)
        ((log_prob * g).sum() + ((entropy * h).sum() if with_entropy else 0)).backward()
        exact = fp64(logits, target, None, 1.0, g.double(), h.double() if with_entropy else None)[2]
        rounded = exact.to(dtype).double()
        error = (leaf.grad.double() - exact).norm()
        # fp32: 1e-6 relative L2. 16 bits: what rounding the exact gradient costs, plus that 1e-6.
        allowed = 1e-6 * exact.norm() + (0 if dtype == torch.float32 else 1.001 * (rounded - exact).norm())
        # A row whose gradient is below 1e-30 (exp(-60) and the like) has none.
        assert error <= allowed + 1e-30, (
            f"{name}: {error / exact.norm():.2e} relative, {allowed / exact.norm():.2e} allowed"
        )


@pytest.mark.parametrize("certainty", [1e-2, 1e-5, 1e-9, 1e-14])
def test_near_certain_tokens_keep_relative_accuracy(implementation, certainty):
    """1 - p(target) and log p(target) are small differences of numbers near 1: they are not computed as such."""
    vocab = 3001
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0))
    logits[0, 17] = logits[0].logsumexp(-1) - math.log(certainty)
    target = torch.tensor([17])
    leaf = logits.clone().requires_grad_()
    log_prob, entropy = log_prob_and_entropy(leaf, target)
    log_prob.sum().backward()
    rest = torch.cat([logits[:, :17], logits[:, 18:]], 1).double()
    odds = (rest - logits[:, 17:18].double()).exp().sum()
    assert abs(log_prob.item() / -math.log1p(odds.item()) - 1) < 2e-6
    assert abs(leaf.grad[0, 17].item() / (odds / (1 + odds)).item() - 1) < 2e-6
    assert entropy.item() > 0


@pytest.mark.parametrize("implementation", ["compiled", CUDA])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 700),
    padding=st.integers(0, 40),
    scale=st.floats(1e-3, 50),
    offset=st.floats(-200, 200),
    temperature=st.floats(0.1, 10),
    dtype=st.sampled_from(DTYPES),
    misalignment=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape_stride_temperature(
    implementation, rows, vocab, padding, scale, offset, temperature, dtype, misalignment, seed
):
    """Odd widths, row strides and addresses; the padding is poisoned with NaN, so reading it would show."""
    with pytest.MonkeyPatch.context() as patch:
        use(implementation, patch)
        check_any_shape(rows, vocab, padding, scale, offset, temperature, dtype, misalignment, seed)


def check_any_shape(rows, vocab, padding, scale, offset, temperature, dtype, misalignment, seed):
    g = torch.Generator().manual_seed(seed)
    columns = vocab + padding
    memory = torch.full((rows, columns + misalignment + 3), math.nan, dtype=dtype)
    logits = memory[:, misalignment : misalignment + columns]
    logits[:, :vocab] = (torch.randn(rows, vocab, generator=g) * scale + offset).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=g)
    if rows > 1:
        target[1] = IGNORE_INDEX
    grad_log_prob, grad_entropy = torch.randn(2, rows, generator=g)
    leaf = logits.detach().requires_grad_()
    log_prob, entropy = log_prob_and_entropy(leaf, target, vocab_size=vocab, temperature=temperature, entropy_grad=True)
    expected = fp64(logits, target, vocab, temperature, grad_log_prob.double(), grad_entropy.double())
    assert_values(log_prob.detach(), entropy.detach(), *expected[:2], "values")
    ((log_prob * grad_log_prob).sum() + (entropy * grad_entropy).sum()).backward()
    assert bool((leaf.grad[:, vocab:] == 0).all())
    if rows > 1:
        assert bool((leaf.grad[1] == 0).all()) and log_prob[1] == 0 and entropy[1] == 0
    exact, rounding = expected[2], (expected[2].to(dtype).double() - expected[2]).norm()
    error = (leaf.grad.double() - exact).norm()
    # 1 / temperature is the size of a gradient's entries before p cancels against the target; the strict bound, per
    # kind of row, is in test_gradient_on_hard_rows.
    assert error <= 2e-6 * max(exact.norm(), 1 / temperature) + 1.001 * rounding


def test_nan_and_inf_stay_in_their_row(implementation):
    for dtype in DTYPES:
        for bad in (math.nan, math.inf):
            for column in (0, 77, 4999):
                logits = torch.randn(4, 5000).to(dtype)
                expected = log_prob_and_entropy(logits, torch.tensor([5, 6, 7, 8]))
                logits[2, column] = bad
                leaf = logits.clone().requires_grad_()
                log_prob, entropy = log_prob_and_entropy(leaf, torch.tensor([5, 6, 7, 8]))
                others = torch.tensor([0, 1, 3])
                assert log_prob[2].isnan() and entropy[2].isnan()
                assert torch.equal(log_prob[others], expected[0][others])
                assert torch.equal(entropy[others], expected[1][others])
                log_prob.sum().backward()
                assert leaf.grad[2].isnan().all() and leaf.grad[others].isfinite().all()


def test_a_row_without_finite_logits_is_nan_unless_ignored(implementation):
    logits = torch.full((2, 100), -math.inf)
    log_prob, entropy = log_prob_and_entropy(logits, torch.tensor([3, IGNORE_INDEX]))
    assert log_prob[0].isnan() and entropy[0].isnan()
    assert log_prob[1] == 0 and entropy[1] == 0


def test_few_long_rows_are_split_over_threads():
    logits = torch.randn(1, 151936) * 3
    target = torch.tensor([151935])
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(log_prob_and_entropy(logits, target))
    finally:
        torch.set_num_threads(threads)
    assert_values(*results[1], *fp64(logits, target)[:2], "two threads")
    assert torch.allclose(torch.cat(results[0]), torch.cat(results[1]), atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_is_the_same_gradient_in_the_logits_memory(implementation, dtype):
    logits, target = (torch.randn(3, 2, 999) * 2).to(dtype), torch.randint(0, 999, (3, 2))
    gradients = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        memory = leaf.detach()
        x = leaf * 1  # as in a model, the logits are not a leaf
        log_prob, _ = log_prob_and_entropy(x, target, inplace_backward=inplace)
        kept = x.detach()
        log_prob.sum().backward()
        gradients.append(leaf.grad)
        assert torch.equal(kept, leaf.grad) == inplace
        assert torch.equal(memory, logits)
    assert torch.equal(*gradients)


def test_entropy_has_a_gradient_only_on_request():
    leaf = torch.randn(2, 50, requires_grad=True)
    assert not log_prob_and_entropy(leaf, torch.tensor([1, 2]))[1].requires_grad
    assert log_prob_and_entropy(leaf, torch.tensor([1, 2]), entropy_grad=True)[1].requires_grad


def test_log_ratio(implementation):
    teacher, student = torch.randn(4, 3, 777) * 2, (torch.randn(4, 3, 777) * 2).bfloat16()
    target = torch.randint(0, 770, (4, 3))
    target[0, 0] = IGNORE_INDEX
    ratio = log_ratio(teacher, student, target, vocab_size=770, temperature=0.7)
    teacher_lp, teacher_h, _ = fp64(teacher, target, 770, 0.7)
    student_lp, student_h, _ = fp64(student, target, 770, 0.7)
    assert_values(ratio.teacher_log_prob, ratio.teacher_entropy, teacher_lp, teacher_h, "teacher")
    assert_values(ratio.student_log_prob, student_h, student_lp, student_h, "student")
    assert (ratio.log_ratio.double() - (teacher_lp - student_lp)).abs().max() < 2e-5
    assert ratio.log_ratio[0, 0] == 0 and ratio.teacher_entropy[0, 0] == 0
    assert not ratio.log_ratio.requires_grad


@pytest.mark.parametrize("chunk_size", [None, 1, 100, 4096])
def test_linear_form_is_the_projection_followed_by_the_kernel(implementation, chunk_size):
    torch.manual_seed(0)
    vocab, columns, width = (21, 24, 16) if chunk_size == 1 else (501, 512, 16)
    hidden = torch.randn(3, 5, width, requires_grad=True)
    weight = torch.randn(columns, width, requires_grad=True)
    target = torch.randint(0, vocab, (3, 5))
    target[1, 1] = IGNORE_INDEX
    g, h = torch.randn(2, 3, 5)
    arguments = dict(vocab_size=vocab, temperature=1.3, entropy_grad=True)
    log_prob, entropy = linear_log_prob_and_entropy(hidden, weight, target, chunk_size=chunk_size, **arguments)
    ((log_prob * g).sum() + (entropy * h).sum()).backward()
    expected = fp64((hidden.double() @ weight.double().T), target, vocab, 1.3)
    assert_values(log_prob.detach(), entropy.detach(), *expected[:2], "values")
    logits = hidden.detach().double() @ weight.detach().double().T
    exact = fp64(logits, target, vocab, 1.3, g.double(), h.double())[2]
    for got, want in (
        (hidden.grad, exact @ weight.detach().double()),
        (weight.grad, torch.einsum("abv,abd->vd", exact, hidden.detach().double())),
    ):
        assert (got.double() - want).norm() <= 1e-6 * want.norm()
    assert bool((weight.grad[vocab:] == 0).all())


def test_fp32_logits_of_bf16_operands_are_accurate():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128).bfloat16(), (torch.randn(3000, 128) * 0.3).bfloat16()
    target = torch.randint(0, 3000, (64,))
    exact = fp64(hidden.double() @ weight.double().T, target)
    wide = linear_log_prob_and_entropy(hidden, weight, target, logits_dtype=torch.float32)
    narrow = linear_log_prob_and_entropy(hidden, weight, target, logits_dtype=torch.bfloat16)
    assert (wide[0] - exact[0]).abs().max() < 1e-5
    assert (narrow[0] - exact[0]).abs().max() > 1e-3  # the purpose of the option


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,)])
def test_no_tokens_and_one(implementation, shape):
    """A rank may have no response tokens: every form returns nothing, and zero gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(*shape, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target = torch.randint(0, 25, shape)
    values = linear_log_prob_and_entropy(hidden, weight, target, vocab_size=25, chunk_size=7)
    expected = log_prob_and_entropy((hidden @ weight.T).detach(), target, vocab_size=25)
    ratio = log_ratio((hidden @ weight.T).detach(), (hidden @ weight.T).detach(), target, vocab_size=25)
    for got, want in zip((*values, ratio.log_ratio), (*expected, torch.zeros(shape)), strict=True):
        assert got.shape == shape
        torch.testing.assert_close(got.detach(), want, atol=1e-5, rtol=1e-6)
    values[0].sum().backward()
    assert hidden.grad.shape == hidden.shape and bool(weight.grad.any()) == (shape == (1,))


def test_tied_embedding_gets_both_gradients():
    torch.manual_seed(0)
    table = torch.randn(50, 8, requires_grad=True)
    ids, target = torch.randint(0, 50, (10,)), torch.randint(0, 50, (10,))
    linear_log_prob_and_entropy(table[ids], table, target, chunk_size=16)[0].sum().backward()
    exact = table.detach().double().requires_grad_()
    (exact[ids] @ exact.T).log_softmax(-1).gather(1, target[:, None]).sum().backward()
    assert (table.grad.double() - exact.grad).norm() <= 1e-6 * exact.grad.norm()


def test_linear_form_skips_what_needs_no_gradient():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    linear_log_prob_and_entropy(hidden, weight, torch.arange(4))[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_kept_logits_change_nothing_and_stay_within_their_budget():
    """Kept or recomputed, the values and gradients are the same bits, in a second backward pass as well."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    target, results = torch.randint(0, 100, (6,)), {}
    for keep_bytes in (0, 6 * 16 * 4 * 3, None):  # none; three chunks of seven; all
        log_prob, _ = linear_log_prob_and_entropy(hidden, weight, target, chunk_size=16, keep_bytes=keep_bytes)
        (node, _), *_ = log_prob.grad_fn.next_functions
        kept = sum(chunk.nbytes for chunk in node.chunks.kept)
        assert kept == (6 * 100 * 4 if keep_bytes is None else keep_bytes)
        first = torch.autograd.grad(log_prob.sum(), (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(log_prob.sum(), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results[keep_bytes] = (log_prob.detach(), *first)
    for other in list(results.values())[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


BAD_INPUT = {
    "dtype": (lambda: log_prob_and_entropy(torch.zeros(2, 5).double(), torch.zeros(2).long()), "logits.*float64"),
    "integer": (lambda: log_prob_and_entropy(torch.zeros(2, 5).long(), torch.zeros(2).long()), "logits.*int64"),
    "no columns": (lambda: log_prob_and_entropy(torch.zeros(2, 0), torch.zeros(2).long()), r"logits.*\(2, 0\)"),
    "scalar": (lambda: log_prob_and_entropy(torch.tensor(1.0), torch.tensor(0)), "logits"),
    "strided rows": (lambda: log_prob_and_entropy(torch.zeros(5, 2).T, torch.zeros(2).long()), r"logits.*\(2, 5\)"),
    "permuted in three": (
        lambda: log_prob_and_entropy(torch.zeros(4, 3, 2, 5).permute(2, 1, 0, 3), torch.zeros(2, 3, 4).long()),
        r"logits.*\(2, 3, 4, 5\)",
    ),
    "target shape": (lambda: log_prob_and_entropy(torch.zeros(2, 5), torch.zeros(3).long()), r"target.*\(2,\).*\(3,\)"),
    "target dtype": (lambda: log_prob_and_entropy(torch.zeros(2, 5), torch.zeros(2).int()), "target.*int32"),
    "target high": (lambda: log_prob_and_entropy(torch.zeros(2, 5), torch.tensor([0, 5])), r"target.*\(2,\).*5"),
    "target in the padding": (
        lambda: log_prob_and_entropy(torch.zeros(1, 5), torch.tensor([4]), vocab_size=4),
        r"target.*\[0, 4\)",
    ),
    "target negative": (lambda: log_prob_and_entropy(torch.zeros(2, 5), torch.tensor([0, -1])), "target.*-1"),
    "vocabulary larger than the shards": (
        lambda: log_prob_and_entropy(torch.zeros(1, 5), torch.tensor([0]), vocab_size=6),
        r"vocab_size 6.*\[1, 5\]",
    ),
    "no vocabulary": (lambda: log_prob_and_entropy(torch.zeros(1, 5), torch.tensor([0]), vocab_size=0), "vocab_size 0"),
    "temperature": (lambda: log_prob_and_entropy(torch.zeros(1, 5), torch.tensor([0]), temperature=0.0), "temper.*0"),
    "overlapping rows": (
        lambda: log_prob_and_entropy(torch.zeros(5).expand(2, 5), torch.tensor([0, 1]), inplace_backward=True),
        "inplace_backward",
    ),
    "ratio shapes": (
        lambda: log_ratio(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2).long()),
        r"teacher_logits \(2, 5\).*student_logits \(2, 6\)",
    ),
    "weight shape": (
        lambda: linear_log_prob_and_entropy(torch.zeros(2, 4), torch.zeros(5, 3), torch.zeros(2).long()),
        r"weight.*\(5, 3\)",
    ),
    "weight dtype": (
        lambda: linear_log_prob_and_entropy(torch.zeros(2, 4), torch.zeros(5, 4).bfloat16(), torch.zeros(2).long()),
        "weight.*bfloat16",
    ),
    "chunk_size": (
        lambda: linear_log_prob_and_entropy(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2).long(), chunk_size=0),
        "chunk_size",
    ),
    "logits_dtype": (
        lambda: linear_log_prob_and_entropy(
            torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2).long(), logits_dtype=torch.bfloat16
        ),
        "logits_dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case):
    call, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_shard_may_be_all_padding():
    """Megatron's default divisor pads a 61-token vocabulary to 128: vocab_size below one shard is ordinary."""
    part = ops.statistics(torch.randn(2, 64), torch.tensor([3, 4]), Shard(64, 64, 0, 61, None, 1), 1.0)
    assert torch.equal(part, torch.tensor([[-math.inf, 0, 0, -math.inf]] * 2))


needs_kernels = pytest.mark.skipif(not ops.compiled(torch.device("cpu")), reason="the kernels are not built")


@needs_kernels
@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.heavy
def test_every_instruction_set_of_this_processor(instruction_set):
    """A process chooses its instruction set once, so each other set is tested in a process of its own."""
    if instruction_set == own_instruction_set():
        pytest.skip("all tests of this file run with it")
    environment = os.environ | {"MEGATRON_EGRSD_SIMD": instruction_set}
    probe = "from megatron_egrsd.vocab_parallel import kernels; print(kernels.instruction_set())"
    used = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, timeout=120)
    if used.stdout.strip() != instruction_set:
        pytest.skip(f"this processor has {used.stdout.strip()} instead")
    pairs = Path(__file__).with_name("test_divergence.py")
    tests = [f"{__file__}::{name}" for name in ("test_values_on_hard_rows", "test_gradient_on_hard_rows")]
    tests += [f"{pairs}::{name}" for name in ("test_hard_rows", "test_rows_of_many_blocks")]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "compiled", *tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.heavy
def test_opcheck(dtype):
    kernels = torch.ops.megatron_egrsd
    logits, target = torch.randn(4, 130).to(dtype), torch.randint(0, 120, (4,))
    part = kernels.statistics(logits, target, None, 1.0, 0, 120)
    grad = torch.randn(4)
    for temperatures in (None, torch.rand(4) + 0.5):
        scale = (temperatures, 1.0, 0, 120)
        torch.library.opcheck(kernels.statistics, (logits, target, *scale))
        torch.library.opcheck(kernels.logits_grad, (logits, target, part, grad, grad, None, *scale))
    torch.library.opcheck(kernels.combine, (part[None],))


@needs_kernels
@pytest.mark.heavy
def test_compiles_without_graph_breaks():
    def loss(logits, target):
        log_prob, entropy = log_prob_and_entropy(logits * 2, target, vocab_size=120, entropy_grad=True)
        return (log_prob + 0.1 * entropy).sum()

    logits, target = torch.randn(4, 130, requires_grad=True), torch.randint(0, 120, (4,))
    expected = torch.autograd.grad(loss(logits, target), logits)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # inductor takes half a minute to say the same
    assert torch.equal(torch.autograd.grad(compiled(logits, target), logits)[0], expected)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Recorder of the size of the largest tensor made while it is active; views do not count."""

    def __init__(self):
        super().__init__()
        self.numel, self.seen = 0, set()

    def ignore(self, *tensors):
        self.seen |= {x.untyped_storage().data_ptr() for x in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.seen:
                self.numel = max(self.numel, x.numel())
        return out


@needs_kernels
def test_the_teacher_pass_allocates_by_tokens():
    logits, target = torch.randn(8, 50000), torch.randint(0, 50000, (8,))
    largest = LargestTensor()
    largest.ignore(logits, target)
    with torch.no_grad(), largest:
        log_prob_and_entropy(logits, target)
        log_ratio(logits, logits, target)
    assert 0 < largest.numel <= 2 * 8 * 4


@needs_kernels
@pytest.mark.parametrize("vocab", [4096, 65536])
def test_the_linear_form_holds_one_chunk_whatever_the_vocabulary(vocab):
    hidden, weight = torch.randn(32, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    target = torch.randint(0, vocab, (32,))
    largest = LargestTensor()
    largest.ignore(hidden, weight, target)
    with largest:
        linear_log_prob_and_entropy(hidden, weight, target, chunk_size=512)
    assert largest.numel == 32 * 512


def test_both_implementations_write_the_same_statistics():
    logits, target = torch.randn(7, 3333) * 4, torch.randint(0, 3333, (7,))
    shard = Shard.of(3333, None, 3300)
    a = ops.statistics(logits, target.clamp_max(3299), shard, 0.9)
    b = reference.statistics(logits, target.clamp_max(3299), 0, 3300, 1 / 0.9)
    assert torch.allclose(reference.combine(a[None])[0][:, 3], a[:, 3])
    for x, y in zip(reference.combine(a[None])[1:], ops.combine(b[None])[1:], strict=True):
        assert torch.allclose(x, y, atol=2e-6)


# Mistake -> (text of kernels.cu, its wrong replacement).
MISTAKES = {
    "no barrier before the warps are merged": ("__syncthreads();\n  if (warp", "if (warp"),
    "no barrier before the coefficients are read": ("__syncthreads();\n  const Grad", "const Grad"),
    "a logit of the tail left out": ("j = g.tail + threadIdx.x; j < valid", "j = g.tail + 1 + threadIdx.x; j < valid"),
    "a vector of the last part left out": ("share, g.vectors)", "share, g.vectors - 1)"),
    "the target in no part": ("if (part == 0 && target >= 0", "if (part == 1 && target >= 0"),
    "vectors read twice": ("i += kUnroll * kThreads) {\n    uint4 v[kUnroll];\n    float x", "i += kThreads) {\n"
                           "    uint4 v[kUnroll];\n    float x"),
    "warps merged four times": ("lane < kWarps ? warps[lane] : empty_statistics()", "warps[lane % kWarps]"),
    "-inf minus -inf": ("if (reference == -INFINITY) {", "if (false) {"),
    "padding with a gradient": ("j < valid ? gradient", "j < columns ? gradient"),
    "an ignored row with a gradient": ("ignored ? 0.f : at_target", "at_target"),
    "a misaligned store": ("target, same_alignment)", "target, true)"),
}  # fmt: skip
SOON = ("no barrier before the warps are merged", "-inf minus -inf", "a misaligned store")  # the others are slow


@pytest.mark.skipif(not cuda_on_cpu.compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "mistake", ["none", *(pytest.param(x, marks=() if x in SOON else pytest.mark.slow) for x in MISTAKES)]
)
@pytest.mark.heavy
def test_a_mistake_in_the_cuda_kernels_is_found(mistake, tmp_path, monkeypatch):
    """The tests above prove something only if wrong kernels fail them."""
    right, wrong = MISTAKES.get(mistake, ("", ""))
    source = cuda_on_cpu.source("kernels.cu")
    assert mistake == "none" or source.count(right) == 1
    library = cuda_on_cpu.build(tmp_path, changed={"kernels.cu": source.replace(right, wrong)})
    use("CUDA", monkeypatch, cuda_on_cpu.Kernels(library))

    def check():
        for dtype in DTYPES:
            check_any_shape(3, 20001, 40, 3.0, 0.0, 1.0, dtype, 1, 0)
        masked = hard_rows(63)["masked"]
        assert_values(*log_prob_and_entropy(masked, masked.argmax(-1)), *fp64(masked, masked.argmax(-1))[:2], "masked")

    if mistake == "none":
        check()
    else:
        with pytest.raises(AssertionError):
            check()
