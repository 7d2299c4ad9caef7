"""The CUDA kernels against the CPU ones, which are tested against fp64. Needs a GPU and a build with nvcc."""

import math

import pytest
import torch

from megatron_egrsd.vocab_parallel import (
    linear_log_prob_and_entropy,
    log_prob_and_entropy,
    log_ratio,
    ops,
    token_statistics,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def built():
    if torch.cuda.is_available():
        assert ops.compiled(torch.device("cuda")), "the package was built without its CUDA part"


def _rows(kind, n, v):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, v, generator=g)
    if kind == "masked":
        x = torch.where(torch.rand(n, v, generator=g) < 0.7, -math.inf, x)
        x[:, v // 3] = 1.0
    return {"random": x * 3, "offset": x + 100, "negative": -x.abs() * 5 - 40, "rising": x.sort(-1).values * 40}.get(
        kind, x
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 151936), (3, 5), (7, 1001), (130, 32001), (2000, 4096), (0, 64)])
@pytest.mark.parametrize("kind", ["random", "offset", "negative", "masked", "rising"])
def test_equals_the_cpu_kernels(kind, shape, dtype):
    n, v = shape
    logits = _rows(kind, n, v).to(dtype)
    target = torch.randint(0, v, (n,))
    target[1:2] = -100
    g, h = torch.randn(2, n)
    results = {}
    for device in ("cpu", "cuda"):
        leaf = logits.to(device, copy=True).requires_grad_()
        log_prob, entropy = log_prob_and_entropy(leaf, target.to(device), temperature=0.9, entropy_grad=True)
        ((log_prob * g.to(device)).nan_to_num(neginf=0).sum() + (entropy * h.to(device)).sum()).backward()
        results[device] = [x.detach().cpu().float() for x in (log_prob, entropy, leaf.grad)]
    for cpu, cuda, name in zip(results["cpu"][:2], results["cuda"][:2], ("log-prob", "entropy"), strict=True):
        torch.testing.assert_close(cuda, cpu, atol=1e-5, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    cpu, cuda = results["cpu"][2], results["cuda"][2]
    ulp = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]  # a value may round the other way
    torch.testing.assert_close(cuda, cpu, atol=ulp * 1e-3, rtol=2 * ulp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("misalignment", [0, 1, 3])
def test_strided_and_unaligned_rows_and_padding(misalignment, dtype):
    memory = torch.full((9, 2100), math.nan, dtype=dtype)
    memory[:, misalignment : misalignment + 2000] = torch.randn(9, 2000).to(dtype)
    target = torch.randint(0, 2000, (9,))
    columns = slice(misalignment, misalignment + 2040)
    expected = log_prob_and_entropy(memory[:, columns], target, vocab_size=2000)
    gradients = {}
    for inplace in (False, True):
        buffer = memory.cuda()
        leaf = buffer[:, columns].requires_grad_()
        log_prob, entropy = log_prob_and_entropy(leaf, target.cuda(), vocab_size=2000, inplace_backward=inplace)
        torch.testing.assert_close(log_prob.cpu(), expected[0], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(entropy.cpu(), expected[1], atol=5e-6, rtol=0)
        log_prob.sum().backward()
        gradients[inplace] = leaf.grad
        assert leaf.grad.isfinite().all() and (leaf.grad[:, 2000:] == 0).all()
    torch.testing.assert_close(gradients[True], gradients[False], atol=1e-6, rtol=1e-2)
    assert torch.equal(leaf.detach(), gradients[True])
    assert buffer[:, :misalignment].isnan().all() and buffer[:, columns.stop :].isnan().all()


def test_nan_stays_in_its_row():
    logits = torch.randn(4, 5000, device="cuda")
    logits[2, 4999] = math.nan
    log_prob, entropy = log_prob_and_entropy(logits, torch.arange(4, device="cuda"))
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [False, False, True, False]


def test_log_ratio_and_linear_form():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128).bfloat16(), (torch.randn(5000, 128) * 0.2).bfloat16()
    target = torch.randint(0, 5000, (64,))
    logits = hidden.float() @ weight.float().T
    ratio = log_ratio(logits.cuda(), (logits * 0.5).cuda(), target.cuda())
    expected = log_ratio(logits, logits * 0.5, target)
    for got, want in zip(ratio, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-6)
    # On a GPU fp32 logits are the default.
    log_prob, _ = linear_log_prob_and_entropy(hidden.cuda(), weight.cuda(), target.cuda(), chunk_size=640)
    torch.testing.assert_close(log_prob.cpu(), expected.teacher_log_prob, atol=1e-5, rtol=1e-6)


def test_forward_allocates_by_tokens():
    logits, target = torch.randn(64, 100000, device="cuda"), torch.zeros(64, dtype=torch.long, device="cuda")
    with torch.no_grad():
        log_prob_and_entropy(logits, target)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        log_prob_and_entropy(logits, target)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_opcheck():
    kernels = torch.ops.megatron_egrsd
    logits, target = torch.randn(4, 130, device="cuda"), torch.randint(0, 120, (4,), device="cuda")
    scale = (None, 1.0, 0, 120)
    part, grad = kernels.statistics(logits, target, *scale), torch.randn(4, device="cuda")
    torch.library.opcheck(kernels.statistics, (logits, target, *scale))
    torch.library.opcheck(kernels.combine, (part[None],))
    torch.library.opcheck(kernels.logits_grad, (logits, target, part, grad, grad, None, *scale))


def test_a_second_use_of_overwritten_logits_raises():
    logits = torch.randn(4, 130, device="cuda", requires_grad=True) * 1
    log_prob, _ = log_prob_and_entropy(logits, torch.arange(4, device="cuda"), inplace_backward=True)
    log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()


def test_rows_that_do_not_merge_and_a_temperature_per_token():
    logits, target = torch.randn(3, 5, 700), torch.randint(0, 700, (3, 4))
    temperature = torch.rand(3, 4) + 0.5
    expected = token_statistics(logits[:, :-1].contiguous(), target, temperature=temperature)
    got = token_statistics(logits.cuda()[:, :-1], target.cuda(), temperature=temperature.cuda())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-6)
