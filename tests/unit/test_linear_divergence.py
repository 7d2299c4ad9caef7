"""The divergence of two LM heads without logits against fp64, chunk by chunk."""

import importlib

import pytest
import torch

from megatron_egrsd.vocab_parallel import linear_divergence, pair_ops
from tests.unit.divergence_cases import FORMS, fp64
from tests.unit.test_divergence import implementation, spare_cuda  # noqa: F401 - a fixture
from tests.unit.test_vocab_parallel import LargestTensor

MODULE = importlib.import_module("megatron_egrsd.vocab_parallel.linear_divergence")  # its name is the function's


def operands(shared: bool, tokens=(3, 5), vocab=200):
    g = torch.Generator().manual_seed(0)
    student_weight = torch.randn(vocab, 16, generator=g)
    teacher_weight = student_weight if shared else torch.randn(vocab, 24, generator=g)
    teacher_hidden = torch.randn(*tokens, teacher_weight.shape[1], generator=g)
    return teacher_hidden, teacher_weight, torch.randn(*tokens, 16, generator=g).requires_grad_(), student_weight


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 48, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_equals_fp64(implementation, form, chunk_size, shared):  # noqa: F811
    spare_cuda(implementation, (form, chunk_size, shared) == ("jsd", 48, False))
    teacher_hidden, teacher_weight, hidden, weight = operands(shared)
    weight = weight.requires_grad_()
    arguments = dict(vocab_size=180, temperature=1.3, **FORMS[form])
    teacher_weight = weight if shared else teacher_weight
    value, entropy = linear_divergence(
        teacher_hidden, teacher_weight, hidden, weight, chunk_size=chunk_size, **arguments
    )
    g = torch.linspace(-1, 1, 15).view(3, 5)
    (value * g).sum().backward()
    teacher = teacher_hidden.double() @ teacher_weight.detach().double().T
    student = hidden.detach().double() @ weight.detach().double().T
    expected, expected_entropy, exact, _ = fp64(teacher, student, g, **arguments)
    assert ((value - expected).abs() <= 5e-6 * (1 + expected.abs())).all()
    assert ((entropy - expected_entropy).abs() <= 1e-5).all()
    for got, want in (
        (hidden.grad, exact @ weight.detach().double()),
        (weight.grad, torch.einsum("abv,abd->vd", exact, hidden.detach().double())),
    ):
        assert (got.double() - want).norm() <= 5e-6 * want.norm()
    assert bool((weight.grad[180:] == 0).all())


@pytest.mark.skipif(not pair_ops.compiled(torch.device("cpu")), reason="the kernels are not built")
@pytest.mark.parametrize("form", ["forward", "jsd", "top 5"])
@pytest.mark.parametrize("vocab", [4096, 32768])
def test_one_chunk_of_both_is_held_whatever_the_vocabulary(vocab, form):
    inputs = operands(False, (32,), vocab)
    largest = LargestTensor()
    largest.ignore(*inputs)
    with largest:
        value, _ = linear_divergence(*inputs, chunk_size=512, keep_bytes=0, **FORMS[form])
        torch.autograd.grad(value.sum(), inputs[2])
    assert largest.numel == 2 * 32 * 512


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["forward", "jsd", "top 5"])
def test_kept_logits_change_nothing_and_stay_within_their_budget(implementation, form, shared):  # noqa: F811
    """Kept or recomputed, the values and gradients are the same bits, in a second backward pass as well."""
    spare_cuda(implementation, form == "jsd" and not shared)
    inputs, results = operands(shared), {}
    differentiated = inputs[2], inputs[3].requires_grad_()
    budget = 2 * 15 * 48 * 4 * 3  # three chunks of five
    for keep_bytes in (0, budget, None):
        value, entropy = linear_divergence(*inputs, chunk_size=48, keep_bytes=keep_bytes, **FORMS[form])
        (node, _), *_ = value.grad_fn.next_functions
        kept = sum(chunk.nbytes for chunk in node.plan[-1].kept)
        assert kept == (2 * 15 * 200 * 4 if keep_bytes is None else keep_bytes)
        first = torch.autograd.grad(value.sum(), differentiated, retain_graph=True)
        second = torch.autograd.grad(value.sum(), differentiated)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results[keep_bytes] = (value.detach(), entropy, *first)
    for other in list(results.values())[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", ["forward", "jsd", "top 5"])
def test_logits_that_fit_are_computed_once(form, monkeypatch):
    """Of five chunks of two models, also without a gradient if forward reads them twice."""
    calls = []
    compute = MODULE.project
    monkeypatch.setattr(MODULE, "project", lambda *a: calls.append(1) or compute(*a))
    inputs = operands(False)
    value, _ = linear_divergence(*inputs, chunk_size=48, **FORMS[form])
    value.sum().backward()
    assert len(calls) == 2 * 5
    calls.clear()
    with torch.no_grad():
        linear_divergence(*inputs, chunk_size=48, **FORMS[form])
    assert len(calls) == 2 * 5


@pytest.mark.parametrize("form", ["jsd", "top 5"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,)])
def test_no_tokens_and_one(implementation, shape, form):  # noqa: F811
    inputs = operands(False, shape)
    value, entropy = linear_divergence(*inputs, chunk_size=64, **FORMS[form])
    value.sum().backward()
    assert value.shape == entropy.shape == shape and inputs[2].grad.shape == inputs[2].shape


def test_bad_operands_are_named():
    teacher_hidden, teacher_weight, hidden, weight = operands(False)
    for inputs, message in (
        ((teacher_hidden[:1], teacher_weight, hidden, weight), "must have the same tokens"),
        ((teacher_hidden, teacher_weight[:100], hidden, weight), "one vocabulary"),
        ((teacher_hidden, weight, hidden, weight), r"weight must be \[V, 24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_divergence(*inputs, kind="forward_kl")
    with pytest.raises(ValueError, match="keep_bytes must not be negative, got -1"):
        linear_divergence(*operands(False), kind="forward_kl", keep_bytes=-1)
    with pytest.raises(ValueError, match="kind must be"):
        linear_divergence(teacher_hidden, teacher_weight, hidden, weight, kind="kl")
