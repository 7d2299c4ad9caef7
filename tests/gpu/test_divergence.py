"""The CUDA kernels of divergences against fp64. Needs a GPU and a build with nvcc."""

import pytest
import torch

from megatron_egrsd.vocab_parallel import divergence, ops
from tests.unit.divergence_cases import FORMS, FULL, GAP, fp64, hard_pairs, near_pairs, with_gaps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def built():
    if torch.cuda.is_available():
        assert ops.compiled(torch.device("cuda")), "the package was built without its CUDA part"


def run(teacher, student, grad_value, **arguments):
    leaf = student.cuda().requires_grad_()
    value, entropy = divergence(teacher.cuda(), leaf, **arguments)
    value.backward(grad_value.cuda())
    return value.detach().cpu(), entropy.cpu(), leaf.grad.cpu()


def check(teacher, student, where, **arguments):
    """Compare with fp64, to the tolerances that the CPU kernels are held to."""
    grad_value = torch.linspace(0.5, -1.5, len(teacher))
    value, entropy, gradient = run(teacher, student, grad_value, **arguments)
    expected, expected_entropy, exact, infinite = fp64(teacher, student, grad_value, **arguments)
    assert torch.equal(value.isinf(), infinite), where
    kept = ~infinite
    value, expected, exact, grad_value = value[kept], expected[kept], exact[kept], grad_value[kept]
    assert bool(((value - expected).abs() <= 3e-6 * expected.abs() + 1e-6).all()), where
    assert bool(((entropy - expected_entropy).abs() <= 5e-6).all()), where
    rounding, smallest = {
        torch.float32: (0.0, 0.0), torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-24)
    }[student.dtype]  # fmt: skip
    allowed = 2e-6 * (grad_value.abs() * expected.abs().clamp_min(1.0))[:, None] + rounding * exact.abs() + smallest
    assert bool(((gradient[kept].double() - exact).abs() <= allowed).all()), where


@pytest.mark.parametrize("vocab", [7, 5003, 151936])
@pytest.mark.parametrize("form", FULL)
def test_hard_rows(form, vocab):
    for name, (teacher, student) in hard_pairs(vocab, rows=3).items():
        check(teacher, student, f"{form}, {name}", temperature=1.3, **FORMS[form])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_and_many_rows(form, rows, dtype):
    g = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(2, rows, 30001, generator=g) * 2).to(dtype)
    check(teacher, student, form, temperature=0.8, **FORMS[form])


@pytest.mark.parametrize("form", ["forward", "reverse", "jsd", "forward clipped"])
def test_near_equal_distributions_keep_their_digits(form):
    for name, (teacher, student) in near_pairs(20001).items():
        value, _, gradient = run(teacher, student, torch.ones(len(teacher)), **FORMS[form])
        expected, _, exact, _ = fp64(teacher, student, torch.ones(len(teacher)), **FORMS[form])
        assert bool(((value - expected).abs() <= 0.02 * expected).all()), name
        assert (gradient - exact).norm() <= 0.02 * exact.norm(), name


@pytest.mark.parametrize("form", FULL)
def test_equal_distributions_give_exact_zeros(form):
    for name, (teacher, _) in hard_pairs(3001).items():
        value, _, gradient = run(teacher, teacher, torch.ones(len(teacher)), **FORMS[form])
        assert bool((value == 0).all()) and bool((gradient == 0).all()), name


def test_the_gradient_is_written_over_unaligned_logits_and_autograd_knows():
    memory = torch.randn(2, 5, 3100, device="cuda")
    teacher, leaf = memory[0, :, 1:3041], memory[1, :, 1:3041].clone().requires_grad_()
    (expected,) = torch.autograd.grad(divergence(teacher, leaf, kind="jsd", vocab_size=3001).value.sum(), leaf)
    buffer, student = with_gaps(leaf)
    value, _ = divergence(teacher, student, kind="jsd", vocab_size=3001, inplace_backward=True)
    gradient, of_leaf = torch.autograd.grad(value.sum(), (student, leaf), retain_graph=True)
    assert gradient.data_ptr() == student.data_ptr() and bool((student[:, 3001:] == 0).all())
    torch.testing.assert_close(of_leaf, expected, atol=2e-6, rtol=1e-5)
    assert bool((buffer[:, :1] == GAP).all() and (buffer[:, 3041:] == GAP).all())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
