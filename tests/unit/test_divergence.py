"""The divergence of two sharded distributions against fp64 on one shard: values, gradients, hard rows, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd.vocab_parallel import divergence, pair_ops
from tests import cuda_on_cpu
from tests.cuda_on_cpu.pairs import ENTRY, PairKernels
from tests.unit.divergence_cases import FORMS, FULL, GAP, fp64, hard_pairs, near_pairs, with_gaps
from tests.unit.test_vocab_parallel import CUDA, DTYPES, LargestTensor

IMPLEMENTATIONS = ["compiled", "plain torch", CUDA]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    spare_cuda(request.param, "top" not in request.node.callspec.params.get("form", ""))  # runs none of these kernels
    use(request.param, monkeypatch)
    return request.param


def use(implementation: str, monkeypatch: pytest.MonkeyPatch, kernels: PairKernels | None = None) -> None:
    if implementation == "plain torch":
        monkeypatch.setattr(pair_ops, "compiled", lambda device: False)
    elif implementation == "CUDA":
        if not cuda_on_cpu.compiler():
            pytest.skip("needs a C++ compiler")
        kernels = kernels or PairKernels(cuda_on_cpu.library(ENTRY))
        for name in ("statistics", "merge", "combine", "entry_sums", "gradient"):
            monkeypatch.setattr(pair_ops, name, getattr(kernels, name))
    elif not pair_ops.compiled(torch.device("cpu")):
        pytest.skip("the kernels are not built on this machine")


def few(implementation: str, count: int) -> int:
    """Return a number of rows or cases: `count`, but 1 for the CUDA kernels, whose threads run one by one here."""
    return 1 if implementation == "CUDA" else count


def spare_cuda(implementation: str, proves_more: bool) -> None:
    """Skip a case that says nothing new about the CUDA kernels."""
    if implementation == "CUDA" and not proves_more:
        pytest.skip("another case reads as much of the CUDA kernels")


def run(teacher, student, grad_value, **arguments):
    leaf = student.detach().requires_grad_()
    result = divergence(teacher, leaf, **arguments)
    finite = torch.where(result.value.isfinite(), result.value, 0.0)
    (torch.where(result.value.isfinite(), finite, result.value) * grad_value).sum().backward()
    return result.value.detach(), result.teacher_entropy, leaf.grad


def check(teacher, student, where="", **arguments):
    """Compare with fp64: values to 3e-6 of their size and 1e-6, entropies to 5e-6, gradients to their rounding."""
    grad_value = torch.linspace(0.5, -1.5, teacher[..., 0].numel()).view(teacher.shape[:-1])
    value, entropy, gradient = run(teacher, student, grad_value, **arguments)
    expected, expected_entropy, exact, infinite = fp64(teacher, student, grad_value, **arguments)
    assert torch.equal(value == math.inf, infinite), f"{where}: infinite where it should not be, or not"
    error = (value - expected)[~infinite].abs()
    allowed = 3e-6 * expected[~infinite].abs() + 1e-6
    assert bool((error <= allowed).all()), f"{where}: value off by {(error - allowed).max():.1e}"
    assert bool(((entropy - expected_entropy).abs() <= 5e-6).all()), f"{where}: entropy"
    if arguments["kind"] != "forward_kl":
        gradient, exact, expected = gradient[~infinite], exact[~infinite], expected[~infinite]
        grad_value = grad_value[~infinite]
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[student.dtype]
    smallest = 2**-24 if student.dtype == torch.float16 else 0.0
    scale = grad_value.abs()[..., None] * expected.abs().nan_to_num(posinf=1.0).clamp_min(1.0)[..., None]
    error = (gradient.double() - exact).abs()
    allowed = 2e-6 * scale + rounding * exact.abs() + smallest
    assert bool((error <= allowed).all()), f"{where}: gradient off by {(error - allowed).max():.1e}"
    assert bool((gradient[..., arguments.get("vocab_size") or gradient.shape[-1] :] == 0).all())


@pytest.mark.parametrize("vocab", [7, 5003])
@pytest.mark.parametrize("form", FULL)
def test_hard_rows(implementation, form, vocab):
    spare_cuda(implementation, vocab == 5003 and form != "jsd 0.1")
    for name, (teacher, student) in hard_pairs(vocab, few(implementation, 6)).items():
        check(teacher, student, f"{form}, {name}", temperature=1.3, **FORMS[form])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [(3, 3), (4, 30), (30, 4)])
def test_rows_of_many_blocks(implementation, scales, dtype):
    """Blocks are summed in the frame of those before them; in some of them one model has hardly any mass."""
    spare_cuda(implementation, False)
    g = torch.Generator().manual_seed(0)
    teacher, student = (scale * torch.randn(16, 50_003, generator=g) for scale in scales)
    for form in ("forward", "reverse"):
        check(teacher.to(dtype), student.to(dtype), form, **FORMS[form])


@pytest.mark.parametrize("form", [name for name in FORMS if name not in FULL])
def test_top_k_and_the_rest(implementation, form):
    for name, (teacher, student) in hard_pairs(300, few(implementation, 6)).items():
        # Ties have no unique top k, and the rest's probability is known to 1e-7 only.
        if name in ("independent", "flat", "apart by 0.1", "all negative", "offset", "the mass comes late"):
            check(teacher, student, f"{form}, {name}", temperature=1.3, vocab_size=290, **FORMS[form])


@pytest.mark.parametrize("form", [dict(kind="jsd"), dict(kind="jsd", beta=0.1), dict(kind="reverse_kl")])
def test_tokens_among_the_top_k_that_the_student_cannot_say(implementation, form):
    """Of the teacher's three likeliest none, one, two and all; and a column that both models exclude."""
    teacher, student = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))
    for row, ids in enumerate(teacher.topk(3).indices):
        student[row, ids[:row]] = -math.inf
    check(teacher, student, "of the teacher", top_k=3, top_k_of="teacher", **form)
    teacher[:, 4:], student[:, 4:] = -math.inf, -math.inf
    student[:, :4] = torch.randn(4, 4)
    check(teacher[:, :6], student[:, :6], "of few columns", top_k=5, **form)


def _top_k_teacher():
    """Log-probs of a teacher at 8 ids a token, of which some repeat; the student finds one of them very unlikely."""
    g = torch.Generator().manual_seed(4)
    log_q = torch.randn(6, 64, generator=g).log_softmax(-1).topk(8).values
    ids = torch.randint(0, 64, (6, 8), generator=g)
    ids[:, 3] = ids[:, 5]
    return log_q, ids, torch.randn(6, 64, generator=g).scatter_(1, ids[:, :1], -50.0)


def test_a_teacher_that_is_known_at_some_ids_alone():
    """verl's distillation loss: sum of q (ln q - ln p) over the ids, which is m (D + ln m) and a constant.

    D is the divergence of logits that are ln q there and -inf elsewhere, m the mass of q. The constant is 0 if no id
    repeats. Expected: the sum in fp64.
    """
    log_q, ids, student = _top_k_teacher()
    q, exact = log_q.exp(), student.double().requires_grad_()
    expected = (log_q.double().exp() * (log_q.double() - exact.log_softmax(-1).gather(1, ids))).sum(-1)
    expected.sum().backward()
    mine, mass = student.clone().requires_grad_(), q.sum(-1)
    columns = torch.zeros_like(student).scatter_add_(1, ids, q)
    constant = (q * log_q).sum(-1) - torch.special.xlogy(columns, columns).sum(-1)
    loss = mass * (divergence(columns.log(), mine, kind="forward_kl").value + mass.log()) + constant
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_a_teacher_with_one_log_prob_outside_its_top_k():
    """NeMo-RL's reverse KL with zero_outside_topk: sum of p (ln p - ln q), ln q = -100 outside the known ids."""
    log_q, ids, student = _top_k_teacher()
    exact = student.double().requires_grad_()
    log_p = exact.log_softmax(-1)
    known = log_p.gather(1, ids)
    rest = (log_p.exp() * log_p).sum(-1) - (known.exp() * known).sum(-1) + 100 * (1 - known.exp().sum(-1))
    expected = (known.exp() * (known - log_q.double())).sum(-1) + rest
    expected.sum().backward()
    count = torch.zeros_like(student).scatter_add_(1, ids, torch.ones_like(log_q))
    teacher = torch.zeros_like(student).scatter_add_(1, ids, log_q) - 100 * (1 - count)
    mine = student.clone().requires_grad_()
    loss = divergence(teacher, mine, kind="reverse_kl").value - teacher.logsumexp(-1)
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-6, atol=1e-6 * exact.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(implementation, form, dtype):
    g = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(2, few(implementation, 5), 3001, generator=g) * 2).to(dtype)
    check(teacher, student, form, temperature=0.8, **FORMS[form])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 5000),
    padding=st.integers(0, 70),
    scale=st.sampled_from([0.01, 1.0, 4.0, 100.0]),
    apart=st.sampled_from([1e-4, 0.1, 3.0, 50.0]),
    offset=st.sampled_from([0.0, -50.0, 200.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    form=st.sampled_from(FULL),
    dtype=st.sampled_from(DTYPES),
    misalignment=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, vocab, padding, scale, apart, offset, temperature, form, dtype, misalignment, seed):
    check_any_shape(rows, vocab, padding, scale, apart, offset, temperature, form, dtype, misalignment, seed)


@pytest.mark.parametrize("form", FULL)
def test_distributions_of_two_columns_far_apart(implementation, form):
    """KL is 69 to 137 nats, and what the two have in common is a column near the end of the range of logits."""
    for seed in range(few(implementation, 20)):
        check_any_shape(1, 2, 0, 0.01, 50.0, 0.0, 0.5, form, torch.float32, 0, seed)


def check_any_shape(rows, vocab, padding, scale, apart, offset, temperature, form, dtype, misalignment, seed):
    g = torch.Generator().manual_seed(seed)
    memory = torch.full((2, rows, misalignment + vocab + padding + 5), math.nan, dtype=dtype)
    a, b = torch.randn(2, rows, vocab, generator=g)
    memory[0, :, misalignment : misalignment + vocab] = (a * scale).to(dtype)
    memory[1, :, misalignment : misalignment + vocab] = (a * scale + b * apart + offset).to(dtype)
    teacher, student = memory[:, :, misalignment : misalignment + vocab + padding]
    check(teacher, student, temperature=temperature, vocab_size=vocab, **FORMS[form])


@pytest.mark.parametrize("vocab", [200, 20001])
@pytest.mark.parametrize("form", ["forward", "reverse", "jsd", "jsd 0.1", "forward clipped", "reverse clipped"])
def test_near_equal_distributions_keep_their_digits(implementation, form, vocab):
    """A divergence of 1e-9 is right to two percent: a sum of p ln(p / q) in fp32 would be noise of 1e-7."""
    spare_cuda(implementation, vocab == 20001)
    for name, (teacher, student) in near_pairs(vocab, few(implementation, 4)).items():
        value, _, gradient = run(teacher, student, torch.ones(len(teacher)), **FORMS[form])
        expected, _, exact, _ = fp64(teacher, student, torch.ones(len(teacher)), **FORMS[form])
        assert bool((expected < 4e-9).all() and (expected > 1e-12).all()), name
        assert bool(((value - expected).abs() <= 0.02 * expected).all()), (name, value, expected)
        assert (gradient - exact).norm() <= 0.02 * exact.norm(), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_distributions_give_exact_zeros(implementation, form, dtype):
    spare_cuda(implementation, dtype == torch.float32 and form in ("forward", "reverse", "jsd clipped"))
    for name, (teacher, _) in hard_pairs(3001, few(implementation, 6)).items():
        if "top" in form and name in ("range 1e4", "rising"):
            continue  # x / temperature in fp32 moves such a logit by 1e-3; the rest is below its floor
        teacher = teacher.to(dtype)
        value, _, gradient = run(teacher, teacher.clone(), torch.ones(len(teacher)), **FORMS[form])
        if "top" in form:
            assert bool((value.abs() < 1e-9).all()) and bool((gradient.abs() < 3e-6).all()), name
        else:
            assert bool((value == 0).all()) and bool((gradient == 0).all()), name


@pytest.mark.parametrize("form", ["forward", "reverse", "jsd", "jsd 0.1"])
def test_values_are_never_negative(implementation, form):
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, few(implementation, 64), 999, generator=g)
    for apart in (0.0, 1e-7, 1e-6, 1e-5, 1e-3, 1.0):
        assert bool((divergence(a * 3 + 7, a * 3 + b * apart - 5, **FORMS[form]).value >= 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_in_its_row(implementation, form):
    g = torch.Generator().manual_seed(6)
    for of in (0, 1):
        logits = torch.randn(2, 4, 4500, generator=g)
        logits[of, 1, 4499], logits[of, 3, 2] = math.nan, math.inf
        value, _ = divergence(*logits, **FORMS[form])
        assert value.isnan().tolist() == [False, True, False, True]


def test_rows_of_any_strides(implementation):
    logits = torch.randn(2, 3, 2, 50)
    for view in (lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[1]):
        check(view(logits[0]), view(logits[1]), kind="forward_kl")
        check(view(logits[0]), view(logits[1]), kind="jsd")
        check(view(logits[0]), view(logits[1]), kind="jsd", top_k=4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (2, 3)])
def test_few_tokens(implementation, form, shape):
    teacher, student = torch.randn(2, *shape, 40), torch.randn(2, *shape, 40)
    check(teacher[0], student[0], kind="forward_kl")
    value, entropy = divergence(teacher[0], leaf := student[0].requires_grad_(), **FORMS[form])
    assert value.shape == entropy.shape == shape and not entropy.requires_grad
    value.sum().backward()
    assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("form", [*FORMS.values(), {"kind": "forward_kl", "top_k": 4}])
def test_the_gradient_is_written_over_the_logits_and_autograd_knows(implementation, form):
    teacher, leaf = torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)
    (expected,) = torch.autograd.grad(divergence(teacher, leaf, **form).value.sum(), leaf)
    buffer, student = with_gaps(leaf)
    value, _ = divergence(teacher, student, inplace_backward=True, **form)
    gradient, of_leaf = torch.autograd.grad(value.sum(), (student, leaf), retain_graph=True)
    assert gradient.data_ptr() == student.data_ptr() and torch.equal(of_leaf, student)
    torch.testing.assert_close(of_leaf, expected, atol=2e-6, rtol=1e-5)  # other vectors, so another order of sums
    assert bool((buffer[:, :1] == GAP).all() and (buffer[:, 71:] == GAP).all())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
    _, student = with_gaps(leaf)
    other = student.square().sum()
    divergence(teacher, student, inplace_backward=True, **form).value.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.skipif(not pair_ops.compiled(torch.device("cpu")), reason="the kernels are not built")
@pytest.mark.parametrize("form", FORMS)
def test_extra_memory_is_proportional_to_the_tokens(form):
    teacher, student = torch.randn(8, 50000), torch.randn(8, 50000, requires_grad=True) * 1
    largest = LargestTensor()
    largest.ignore(teacher, student)
    with largest:
        value, _ = divergence(teacher, student, inplace_backward=True, **FORMS[form])
        torch.autograd.grad(value.sum(), student)
    assert 0 < largest.numel <= 8 * (8 + 3 * 5)


BAD_INPUT = {
    "kind": (dict(kind="kl"), "kind.*'kl'"),
    "beta": (dict(kind="jsd", beta=1.0), "beta.*1.0.*reverse_kl"),
    "clip": (dict(kind="forward_kl", entry_clip=0.0), "entry_clip.*0.0"),
    "top k": (dict(kind="jsd", top_k=0), "top_k.*0"),
    "half a column": (dict(kind="jsd", top_k=2.5), "top_k.*2.5"),
    "top k of": (dict(kind="jsd", top_k=3, top_k_of="both"), "both"),
    "temperature": (dict(kind="jsd", temperature=0.0), "temperature.*0.0"),
    "temperatures": (dict(kind="jsd", temperature=torch.ones(2)), "temperature.*a number"),
    "vocabulary": (dict(kind="jsd", vocab_size=6), r"vocab_size 6.*\[1, 5\]"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_options_are_named(case):
    arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        divergence(torch.zeros(2, 5), torch.zeros(2, 5), **arguments)


def test_bad_logits_are_named():
    for teacher, student, message in (
        (torch.zeros(2, 5), torch.zeros(2, 6), r"teacher_logits.*\(2, 5\).*student_logits.*\(2, 6\)"),
        (torch.zeros(2, 5).bfloat16(), torch.zeros(2, 5), "bfloat16.*float32"),
        (torch.zeros(2, 5).double(), torch.zeros(2, 5).double(), "teacher_logits.*float64"),
        (torch.zeros(2, 5), torch.zeros(5, 2).T, "student_logits"),
    ):
        with pytest.raises(ValueError, match=message):
            divergence(teacher, student, kind="forward_kl")
    with pytest.raises(ValueError, match="inplace_backward"):
        divergence(torch.zeros(2, 5), torch.zeros(5).expand(2, 5), kind="forward_kl", inplace_backward=True)


# Mistake -> (file of csrc/cuda, its text, the wrong replacement).
MISTAKES = {
    "no barrier before the warps are merged": ("block.h", "warps[warp] = x;\n  __syncthreads();", "warps[warp] = x;"),
    "a reference raised without the sums": ("pair_sums.h", "        sums = raised(sums, needed);\n",
                                            "        sums.reference = needed;\n"),
    "the first estimate of r' - r is the last": ("pair_sums.h", "if (!result.found || !again)", "if (true)"),
    "-inf taken for mass": ("pair_sums.h", "if (no_p || no_q) return without_mass(sums, no_p, no_q);", ""),
    "far columns taken for near ones": ("pair_sums.h", "sums.farthest <= kFar &&", "true ||"),
    "small differences by subtraction": ("pair_sums.h", "fabsf(v) < 0.5f ? series : direct", "direct"),
    "a logit of the tail left out": ("pair_part.h", "j = tail + threadIdx.x;", "j = tail + 1 + threadIdx.x;"),
    "ends in every part": ("pair_part.h", "has_ends(part == 0)", "has_ends(true)"),
    "a misaligned store": ("divergence.cu", "span(s, valid, same_alignment)", "span(s, valid, true)"),
    "a chunk of the gradient left out": ("divergence.cu", "(pair.columns + per_block - 1) / per_block",
                                         "pair.columns / per_block"),
}  # fmt: skip
SOON = ("no barrier before the warps are merged", "-inf taken for mass", "a misaligned store")  # the others are slow


def check_the_cuda_kernels():
    """Rows of several parts and of every kind, each of the two kernels of the first reading, and every second one."""
    for dtype in DTYPES:
        check_any_shape(2, 17001, 40, 3.0, 0.1, 1.0, 1.0, "forward", dtype, 1, 0)
    teacher, student = torch.randn(3, 2061), torch.randn(3, 2062)[:, 1:]  # rows of different alignments
    check(teacher, student, kind="reverse_kl")
    cases = hard_pairs(5003, rows=2) | near_pairs(5003, rows=2)
    for name in ("student masked", "rising", "one-hot", "offset"):
        check(*cases[name], name, kind="jsd", entry_clip=0.002)
    check(*hard_pairs(16384, rows=2)["teacher masked at first"], kind="jsd")  # the first of two parts has no mass
    # Two parts of 2,500 vectors each: the references come from a sample without weight, and hide the rest's divergence.
    noise, gap = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0)), 20.0
    sampled = torch.arange(20000) // 4 % 2500 % (2500 // 8) < 32
    gapped = noise + gap * ~sampled
    for teacher, student in (cases["student 100 higher"], (gapped, gapped + noise * 4.5e-5 + sampled)):
        value, _, _ = run(teacher, student, torch.ones(2), kind="forward_kl")
        expected = fp64(teacher, student, torch.ones(2), kind="forward_kl")[0]
        assert bool(((value - expected).abs() <= 0.02 * expected).all())


@pytest.mark.skipif(not cuda_on_cpu.compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "mistake", ["none", *(pytest.param(x, marks=() if x in SOON else pytest.mark.slow) for x in MISTAKES)]
)
@pytest.mark.heavy
def test_a_mistake_in_the_cuda_kernels_is_found(mistake, tmp_path, monkeypatch):
    changed = {}
    if mistake != "none":
        file, right, wrong = MISTAKES[mistake]
        assert cuda_on_cpu.source(file).count(right) == 1
        changed = {file: cuda_on_cpu.source(file).replace(right, wrong)}
    use("CUDA", monkeypatch, PairKernels(cuda_on_cpu.build(tmp_path, ENTRY, changed)))
    if mistake == "none":
        check_the_cuda_kernels()
    else:
        with pytest.raises(AssertionError):
            check_the_cuda_kernels()
