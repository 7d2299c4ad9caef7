"""The other forms of the loss against fp64: log-normaliser, many ids, masks, smoothing, ids beyond the vocabulary."""

import math

import pytest
import torch

from megatron_egrsd.vocab_parallel import (
    cross_entropy,
    gather_log_probs,
    linear_token_statistics,
    log_softmax,
    masked_log_prob,
    token_statistics,
)
from tests.unit.test_vocab_parallel import CUDA, LargestTensor, use

ATOL = 3e-6


@pytest.fixture(params=["compiled", "plain torch", CUDA], autouse=True)
def implementation(request, monkeypatch):
    use(request.param, monkeypatch)
    torch.manual_seed(0)
    return request.param


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def close(got, want, relative=2e-6):
    """Compare to a relative L2 norm, the precision of fp32."""
    got, want = got.detach().double(), want.detach().double()
    assert (got - want).norm() <= relative * want.norm() + 1e-12, (got - want).norm() / want.norm()


@pytest.mark.parametrize("per_token", [False, True])
def test_all_three_results_have_their_gradients(per_token):
    logits, target = torch.randn(5, 301) * 3, torch.randint(0, 290, (5,))
    target[2] = -100
    temperature = torch.rand(5) + 0.5 if per_token else 0.7
    weights = torch.randn(3, 5)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values = token_statistics(leaf, target, vocab_size=290, temperature=temperature, entropy_grad=True)
    scaled = exact[:, :290] / (temperature.double()[:, None] if per_token else temperature)
    log_p = scaled.log_softmax(-1)
    kept = (target != -100).double()
    want = [
        log_p.gather(1, target.clamp_min(0)[:, None])[:, 0] * kept,
        -(log_p.exp() * log_p).sum(-1) * kept,
        scaled.logsumexp(-1) * kept,
    ]
    for got, expected in zip(values, want, strict=True):
        assert (got - expected).abs().max() < 1e-5
    grad = gradient(sum((v * w).sum() for v, w in zip(values, weights, strict=True)), leaf)
    close(grad, gradient(sum((v * w).sum() for v, w in zip(want, weights.double(), strict=True)), exact))


def test_a_z_loss_alone_and_no_target():
    logits = torch.randn(4, 99)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values = token_statistics(leaf)
    assert values.log_prob is None
    close(gradient(values.log_normalizer.square().sum(), leaf), gradient(exact.logsumexp(-1).square().sum(), exact))


LAYOUTS = {
    "one row dropped of each": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "every second": lambda x: x[::2, 1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_dimensions_that_do_not_merge_need_no_copy(implementation, layout):
    logits = LAYOUTS[layout](torch.randn(4, 5, 73))
    assert not logits.is_contiguous()
    target = torch.randint(0, 73, logits.shape[:-1])
    contiguous = logits.contiguous().requires_grad_()
    results = []
    for x in (logits.detach().requires_grad_(), contiguous):
        largest = LargestTensor()
        largest.ignore(x)
        with largest:
            values = token_statistics(x, target, entropy_grad=True)
        assert implementation != "compiled" or largest.numel < x.numel()
        results.append((*values, gradient((values.log_prob * 2 + values.entropy).sum(), x)))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_the_gradient_is_written_over_logits_that_are_apart(layout):
    buffer, outside = torch.full((4, 5, 73), 7.0), torch.ones(4, 5, 73, dtype=torch.bool)
    logits = LAYOUTS[layout](buffer)
    LAYOUTS[layout](outside).fill_(False)
    leaf = torch.randn(logits.shape, requires_grad=True)
    target = torch.randint(0, 73, leaf.shape[:-1])
    expected = gradient((token_statistics(leaf, target).log_prob * 2).sum(), leaf)
    logits.copy_(leaf)
    assert not logits.is_contiguous()
    log_prob = token_statistics(logits, target, inplace_backward=True).log_prob
    close(gradient((log_prob * 2).sum(), leaf), expected)
    close(logits, expected)
    assert bool((buffer[outside] == 7).all())


def test_many_ids_from_one_read():
    logits, ids = torch.randn(3, 4, 120), torch.randint(0, 110, (3, 4, 7))
    ids[0, 0] = 5  # the same id seven times
    weights = torch.randn(3, 4, 7)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = gather_log_probs(leaf, ids, vocab_size=110, temperature=0.8)
    want = (exact[..., :110] / 0.8).log_softmax(-1).gather(-1, ids)
    assert (got - want).abs().max() < 1e-5
    close(gradient((got * weights).sum(), leaf), gradient((want * weights.double()).sum(), exact))


def test_ignored_ids_are_exact_zeros_and_unchecked_ones_impossible(monkeypatch):
    """As in token_statistics; the ids are not checked on an accelerator."""
    logits, ids = torch.randn(3, 20), torch.tensor([[4, -100], [-100, -100], [7, 20]])
    monkeypatch.setattr("megatron_egrsd.vocab_parallel.gather.check_target", lambda *_: None)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, want = gather_log_probs(leaf, ids), exact.log_softmax(-1).gather(-1, ids.clamp(0, 19))
    assert got[0, 1] == got[1, 0] == got[1, 1] == 0 and got[2, 1] == -math.inf
    close(got[[0, 2], 0], want[[0, 2], 0])
    close(gradient(got.sum(), leaf), gradient(want[[0, 2], 0].sum(), exact))


def test_log_softmax():
    logits, weights = torch.randn(3, 50), torch.randn(3, 50)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, want = log_softmax(leaf, temperature=1.3), (exact / 1.3).log_softmax(-1)
    assert (got - want).abs().max() < ATOL
    close(gradient((got * weights).sum(), leaf), gradient((want * weights.double()).sum(), exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_keeps_the_target_and_drops_the_rest(dtype):
    logits, target = torch.randn(6, 80).to(dtype), torch.randint(0, 80, (6,))
    keep = torch.rand(6, 80) < 0.3
    keep[torch.arange(6), target] = torch.arange(6) % 2 == 0
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_prob = masked_log_prob(leaf, keep, target)
    kept = keep.clone()
    kept[torch.arange(6), target] = True
    want = exact.masked_fill(~kept, -math.inf).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert (log_prob - want).abs().max() < 1e-5
    grad = gradient(log_prob.sum(), leaf)
    assert bool((grad[~kept].abs() < 1e-37).all())
    close(grad, gradient(want.sum(), exact), 2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("vocab_size", [None, 50])
def test_label_smoothing(vocab_size):
    logits, target = torch.randn(6, 60), torch.randint(0, 50, (6,))
    target[1] = -100
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = cross_entropy(leaf, target, label_smoothing=0.1, vocab_size=vocab_size, temperature=0.9)
    log_p = (exact[:, :vocab_size] / 0.9).log_softmax(-1)
    size = log_p.shape[1]
    smooth = torch.full_like(log_p, 0.1 / (size - 1)).scatter(1, target.clamp_min(0)[:, None], 0.9)
    want = -(smooth * log_p).sum(-1) * (target != -100)
    assert (loss - want).abs().max() < 1e-5
    close(gradient(loss.sum(), leaf), gradient(want.sum(), exact))


def test_ids_beyond_the_vocabulary_and_another_ignore_index():
    logits = torch.randn(5, 40)
    target = torch.tensor([3, -1, 39, 1000, -100])
    leaf = logits.clone().requires_grad_()
    values = token_statistics(leaf, target, vocab_size=39, ignore_index=-1, out_of_vocabulary="zero", entropy_grad=True)
    log_p = logits[:, :39].double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert values.log_prob[1:].tolist() == [0.0] * 4 and abs(values.log_prob[0] - log_p[0, 3]) < ATOL
    assert values.entropy[1] == 0 and (values.entropy - entropy)[[0, 2, 3, 4]].abs().max() < ATOL
    grad = gradient(values.log_prob.sum(), leaf)
    assert bool((grad[1:] == 0).all()) and bool(grad[0].any())


def test_the_linear_form_has_the_same_options():
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    target, temperature = torch.tensor([1, 39, -7, 100, 5, 6]), torch.rand(6) + 0.5
    options = dict(temperature=temperature, ignore_index=-7, out_of_vocabulary="zero", entropy_grad=True)
    got = linear_token_statistics(hidden, weight, target, chunk_size=11, **options)
    want = token_statistics(hidden @ weight.T, target, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)
    for leaf in (hidden, weight):
        grads = [torch.autograd.grad(sum(x.sum() for x in v), leaf, retain_graph=True)[0] for v in (got, want)]
        close(grads[0], grads[1], 5e-6)


def test_the_linear_form_shows_its_chunks():
    hidden, weight, target = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8), torch.randint(0, 40, (5,))
    seen = []
    linear_token_statistics(
        hidden, weight, target, chunk_size=16, observe=lambda logits: seen.append(logits.clone())
    ).log_prob.sum().backward()
    assert [logits.shape[1] for logits in seen] == [16, 16, 8]  # in forward alone
    torch.testing.assert_close(torch.cat(seen, 1), (hidden @ weight.T).detach())


def test_fp32_gradients_of_half_operands():
    hidden, weight = torch.randn(32, 64).bfloat16(), (torch.randn(500, 64) * 0.3).bfloat16()
    target, exact = torch.randint(0, 500, (32,)), hidden.double().requires_grad_()
    want = gradient((exact @ weight.double().T).log_softmax(-1).gather(1, target[:, None]).sum(), exact)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        leaf = hidden.clone().requires_grad_()
        values = linear_token_statistics(leaf, weight, target, logits_dtype=torch.float32, grad_dtype=dtype)
        errors[dtype] = (gradient(values.log_prob.sum(), leaf).double() - want).norm() / want.norm()
    rounding = (want.bfloat16().double() - want).norm() / want.norm()
    assert errors[torch.float32] <= 1.001 * rounding + 1e-6 < errors[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_added_to_main_grad(dtype):
    hidden, weight = torch.randn(6, 16).to(dtype), torch.nn.Parameter(torch.randn(40, 16).to(dtype))
    target = torch.randint(0, 40, (6,))
    linear_token_statistics(hidden, weight, target, chunk_size=11)[0].sum().backward()
    expected, weight.grad = weight.grad, None
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(40, 16), False
    linear_token_statistics(hidden, weight, target, chunk_size=11, main_grad=True)[0].sum().backward()
    assert weight.grad_added_to_main_grad
    close(weight.main_grad - 1, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    with pytest.raises(ValueError, match="main_grad"):
        linear_token_statistics(hidden, torch.randn(40, 16).to(dtype), target, main_grad=True)


BAD = {
    "smoothing": (lambda: cross_entropy(torch.zeros(1, 5), torch.tensor([0]), label_smoothing=1.0), "label_smoothing"),
    "mask": (lambda: masked_log_prob(torch.zeros(1, 5), torch.ones(1, 4) > 0, torch.tensor([0])), "keep"),
    "ids": (lambda: gather_log_probs(torch.zeros(1, 5), torch.tensor([0])), "ids"),
    "an id": (lambda: gather_log_probs(torch.zeros(1, 5), torch.tensor([[5]])), "5"),
    "temperatures": (
        lambda: token_statistics(torch.zeros(2, 5), torch.tensor([0, 1]), temperature=torch.tensor([1.0, 0.0])),
        "temperature",
    ),
    "temperature's shape": (
        lambda: token_statistics(torch.zeros(2, 5), torch.tensor([0, 1]), temperature=torch.ones(3)),
        r"temperature.*\(2,\)",
    ),
    "out_of_vocabulary": (
        lambda: token_statistics(torch.zeros(1, 5), torch.tensor([0]), out_of_vocabulary="ignore"),
        "out_of_vocabulary",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
