"""The adapters at their peers' signatures on two ranks: what the peers' own tests ask of them, against fp64."""

import importlib
import importlib.util
import inspect
import sys
import textwrap
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from megatron_egrsd.vocab_parallel.adapters import patching
from tests.ranks import run_ranks

VOCAB, TOKENS = 96, 11


def _reference(logits, labels, g, h):
    """log-prob, entropy and gradient by the definitions, in fp64, over the whole vocabulary."""
    z = logits.double().requires_grad_()
    log_p = z.log_softmax(-1)
    log_prob = log_p.gather(-1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    ((log_prob * g).sum() + (entropy * h).sum()).backward()
    return log_prob.detach(), entropy.detach(), z.grad


def _adapters(rank, world_size):
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_egrsd.vocab_parallel.adapters import areal, megatron_lm, miles, nemo_rl, slime, verl

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    group = parallel_state.get_tensor_model_parallel_group()
    r = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(TOKENS, VOCAB, generator=r) * 3, torch.randint(0, VOCAB, (TOKENS,), generator=r)
    g_lp, g_h = torch.randn(2, TOKENS, generator=r)
    log_prob, entropy, gradient = _reference(logits, labels, g_lp, g_h)
    own, columns = gradient.chunk(world_size, -1)[rank], VOCAB // world_size
    start, end = rank * columns, (rank + 1) * columns
    shard = logits.chunk(world_size, -1)[rank].contiguous()

    def check(call):
        leaf = shard.clone().requires_grad_()
        lp, h = call(leaf)
        loss = (lp.view(-1) * g_lp).sum() + (h.view(-1) * g_h).sum()
        loss.backward(retain_graph=True)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], leaf.grad)  # nothing was overwritten
        assert (lp.view(-1) - log_prob).abs().max() < 2e-6 * log_prob.abs().max()
        assert (h.view(-1) - entropy).abs().max() < 2e-6
        assert (leaf.grad - own).norm() <= 1e-6 * own.norm()

    # None is the default group in slime and miles; verl takes Megatron's
    check(lambda x: slime.calculate_log_probs_and_entropy(x, labels, None, with_entropy=True, chunk_size=4))
    check(lambda x: miles.calculate_log_probs_and_entropy(x, labels, group, with_entropy=True))
    check(lambda x: areal.gather_logprobs_entropy(x, labels, 1.0, group, chunk_size=3))
    check(lambda x: (verl.vocab_parallel_log_probs_from_logits(x, labels), verl.vocab_parallel_entropy(x)))
    batch = labels[None]
    check(
        lambda x: (
            nemo_rl.ChunkedDistributedLogprob.apply(x[None], batch, start, end, 4, group),
            -nemo_rl.ChunkedDistributedEntropy.apply(x[None], 4, group),
        )
    )
    check(lambda x: (areal.gather_logprobs(x, labels, tp_group=group), verl.vocab_parallel_entropy(x)))
    check(lambda x: (areal.gather_logprobs(x, labels, tp_group=group), verl.vocab_parallel_entropy_with_chunking(x, 4)))
    _areal_reuses_logits(areal, shard, labels, group)
    _a_second_use_raises(
        lambda x: areal.gather_logprobs_entropy(x, labels, tp_group=group, reuse_logits=True)[0], shard
    )
    _a_second_use_raises(lambda x: megatron_lm.vocab_parallel_cross_entropy(x, labels, inplace_backward=True), shard)
    _areal_chunked_head(areal, rank, world_size, group, r)

    kept = torch.rand(TOKENS, VOCAB, generator=r) < 0.4  # slime: for the log-prob alone, with the sampled token in it
    mine = kept.chunk(world_size, -1)[rank]
    lp, h = slime.calculate_log_probs_and_entropy(shard, labels, None, with_entropy=True, log_prob_keep_mask=mine)
    kept[torch.arange(TOKENS), labels] = True
    exact = logits.double().masked_fill(~kept, -torch.inf).log_softmax(-1).gather(1, labels[:, None])
    assert lp.shape == (TOKENS, 1) and (lp - exact).abs().max() < 1e-5 and (h - entropy).abs().max() < 2e-6
    assert slime.calculate_log_probs_and_entropy(shard[:0], labels[:0], None)[0].shape == (0,)
    assert slime.calculate_log_probs_and_entropy(shard, labels, None)[1] is None

    leaf = shard.clone().requires_grad_()
    ids = torch.randint(0, VOCAB, (1, TOKENS, 5), generator=r)
    many = nemo_rl.ChunkedDistributedGatherLogprob.apply(leaf[None], ids, start, end, 4, group)
    z = logits.double().requires_grad_()
    wanted = z.log_softmax(-1)[None].gather(-1, ids)
    assert (many - wanted).abs().max() < 1e-5
    many.square().sum().backward()
    wanted.square().sum().backward()
    assert (leaf.grad - z.grad[:, start:end]).norm() <= 2e-6 * z.grad.norm()
    with pytest.raises(ValueError, match="begins at"):
        nemo_rl.DistributedLogprob.apply(shard[None], batch, start + 1, end + 1, group)

    leaf = shard.clone().requires_grad_()  # each rank uses its own columns: the normaliser's gradient is summed
    z = logits.double().requires_grad_()
    weights = torch.randn(TOKENS, VOCAB, generator=r)
    (nemo_rl._compute_distributed_log_softmax_with_grad(leaf, group) * weights[:, start:end]).sum().backward()
    (z.log_softmax(-1) * weights).sum().backward()
    assert (leaf.grad - z.grad[:, start:end]).norm() <= 2e-6 * z.grad.norm()

    theirs = tensor_parallel.vocab_parallel_cross_entropy(shard[:, None].clone(), labels[:, None])
    ours = megatron_lm.vocab_parallel_cross_entropy(shard[:, None], labels[:, None])
    assert (ours - theirs).abs().max() < 2e-6 and ours.shape == theirs.shape
    missing = megatron_lm.vocab_parallel_cross_entropy(shard[:, None], torch.full((TOKENS, 1), -100))
    assert bool((missing == 0).all())

    hidden, weight = torch.randn(TOKENS, 8, generator=r), torch.randn(VOCAB, 8, generator=r)
    mine, part = hidden.clone().requires_grad_(), weight.chunk(world_size)[rank].clone().requires_grad_()
    lp, h = verl.linear_cross_entropy(mine[None], part, labels[None], 1.5, "none", group)
    ((lp * g_lp).sum() + (h * g_h).sum()).backward()
    z, w = hidden.double().requires_grad_(), weight.double()
    lp_h = _reference((z.detach() @ w.T) / 1.5, labels, g_lp, g_h)
    assert (lp - lp_h[0]).abs().max() < 1e-5 and (h - lp_h[1]).abs().max() < 5e-6
    dist.all_reduce(mine.grad)  # outside of the function, as verl does
    exact = lp_h[2] @ w / 1.5
    assert (mine.grad - exact).norm() <= 2e-6 * exact.norm()
    dist.destroy_process_group()


def _areal_reuses_logits(areal, shard, labels, group):
    """The gradient is written over an intermediate result and its whole views; leaves and parts are left alone."""

    def run(view, reuse):
        leaf = shard.clone().requires_grad_()
        logits = leaf + 0.0
        before = logits.detach().clone()
        given = view(leaf, logits)
        log_prob, entropy = areal.gather_logprobs_entropy(
            given, labels[: given.shape[0]], tp_group=group, reuse_logits=reuse
        )
        assert entropy.requires_grad != reuse
        log_prob.square().sum().backward()
        return leaf.grad, bool((logits == before).all())

    for view, overwritten in (
        (lambda leaf, x: x, True),
        (lambda leaf, x: x[None].squeeze(0), True),
        (lambda leaf, x: x[:4], False),
        (lambda leaf, x: leaf, False),
    ):
        gradient, untouched = run(view, True)
        assert torch.equal(gradient, run(view, False)[0]) and untouched != overwritten


def _a_second_use_raises(loss, shard):
    """Once backward has written the gradient over the logits: the same function again, and another one."""
    for again in (lambda own, other: own, lambda own, other: other):
        logits = shard.clone().requires_grad_() + 0.0
        own, other = loss(logits).sum(), logits.square().sum()
        own.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again(own, other).backward()


def _areal_chunked_head(areal, rank, world_size, group, r):
    """AReaL's LM head by chunks: bf16 with fp32 operands, with and without sequence parallelism, against fp64."""

    class ChunkedLMHeadOutput(NamedTuple):
        logprobs: torch.Tensor
        entropy: torch.Tensor
        low: torch.Tensor
        high: torch.Tensor
        mean: torch.Tensor
        norm: torch.Tensor

    sys.modules[areal._HEAD_MODULE] = peer = ModuleType(areal._HEAD_MODULE)
    peer.ChunkedLMHeadOutput = ChunkedLMHeadOutput
    layer = SimpleNamespace(
        bias=None, gather_output=False, config=SimpleNamespace(defer_embedding_wgrad_compute=False), tp_group=group,
        gradient_accumulation_fusion=True, fp32_operands=True,
    )  # fmt: skip
    hidden, weight = torch.randn(10, 1, 8, generator=r).bfloat16(), torch.randn(VOCAB, 8, generator=r).bfloat16()
    labels, g = torch.randint(0, VOCAB, (10, 1), generator=r), torch.randn(10, generator=r)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (x @ w.T).view(10, VOCAB) * 1.5
    log_p = (logits / 0.7).log_softmax(-1)
    log_prob = log_p.gather(1, labels)[:, 0]
    (log_prob * g).sum().backward()
    part, w_grad = logits.detach().chunk(world_size, -1)[rank], w.grad.chunk(world_size)[rank]
    for layer.sequence_parallel in (False, True):
        mine = (hidden.chunk(world_size)[rank] if layer.sequence_parallel else hidden).clone().requires_grad_()
        shard = weight.chunk(world_size)[rank].clone().requires_grad_()
        shard.main_grad, shard.grad_added_to_main_grad = torch.zeros(shard.shape), False
        out = areal.chunked_lm_head_logprobs_entropy(
            layer, mine, shard, labels, temperature=0.7, chunk_size=3, logit_scale=1.5
        )
        (out.logprobs * g).sum().backward()
        assert (out.logprobs - log_prob).abs().max() < 1e-5 and not out.entropy.requires_grad
        assert (out.entropy + (log_p.exp() * log_p).sum(-1)).abs().max() < 5e-6
        for ours, exact in zip(out[2:], (part.amin(-1), part.amax(-1), part.mean(-1), part.norm(dim=-1)), strict=True):
            assert (ours - exact).abs().max() < 1e-5
        assert (shard.main_grad - w_grad).norm() < 2e-6 * w_grad.norm()  # a bf16 gradient of the logits: 2e-3
        x_grad = x.grad.chunk(world_size)[rank] if layer.sequence_parallel else x.grad
        assert (mine.grad - x_grad).norm() < 2**-8 * x_grad.norm()  # parts and their sum are rounded to bf16
    with pytest.raises(NotImplementedError, match="no bias"):
        layer.bias = shard
        areal.chunked_lm_head_logprobs_entropy(layer, mine, shard, labels, temperature=1.0, chunk_size=3)


def test_adapters_on_two_ranks():
    run_ranks(_adapters, 2)


class DuckGroup:
    def rank(self):
        return 0

    def size(self):
        return 1


def test_a_group_may_be_any_object_with_a_rank_and_a_size():
    from megatron_egrsd.vocab_parallel.adapters import megatron_lm

    logits, target = torch.randn(4, 9), torch.tensor([0, 8, 3, 1])
    loss = megatron_lm.vocab_parallel_cross_entropy(logits, target, tp_group=DuckGroup())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    smooth = megatron_lm.vocab_parallel_cross_entropy(logits, target, 0.1, DuckGroup())
    log_p = logits.log_softmax(-1)
    weights = torch.full_like(log_p, 0.1 / 8).scatter(1, target[:, None], 0.9)
    torch.testing.assert_close(smooth, -(weights * log_p).sum(-1))


# The parameters of the peers' functions, which they pass by position and by name.
PARAMETERS = {
    "areal.gather_logprobs": "logits labels temperature tp_group chunk_size",
    "areal.gather_logprobs_entropy": "logits labels temperature tp_group chunk_size reuse_logits",
    "areal._vocab_parallel_logprobs": "vocab_parallel_logits labels tp_group temperature",
    "areal._vocab_parallel_logprobs_entropy": "vocab_parallel_logits labels tp_group temperature",
    "areal.chunked_lm_head_logprobs_entropy": (
        "output_layer hidden_states weight labels temperature chunk_size logit_scale"
    ),
    "megatron_lm.vocab_parallel_cross_entropy": "vocab_parallel_logits target label_smoothing tp_group",
    "megatron_lm.fused_vocab_parallel_cross_entropy": "vocab_parallel_logits target tp_group",
    "miles.calculate_log_probs_and_entropy": (
        "logits tokens tp_group with_entropy entropy_requires_grad chunk_size true_on_policy vocab_size"
    ),
    "nemo_rl.DistributedLogprob": "vocab_parallel_logits target vocab_start_index vocab_end_index group inference_only",
    "nemo_rl.ChunkedDistributedLogprob": (
        "vocab_parallel_logits target vocab_start_index vocab_end_index chunk_size tp_group inference_only"
    ),
    "nemo_rl.ChunkedDistributedGatherLogprob": (
        "vocab_parallel_logits global_indices vocab_start_index vocab_end_index chunk_size tp_group inference_only"
    ),
    "nemo_rl.ChunkedDistributedEntropy": "vocab_parallel_logits chunk_size tp_group inference_only",
    "nemo_rl._compute_distributed_log_softmax": "vocab_parallel_logits group",
    "nemo_rl._compute_distributed_log_softmax_with_grad": "vocab_parallel_logits group",
    "slime.calculate_log_probs_and_entropy": (
        "logits tokens tp_group with_entropy chunk_size log_prob_keep_mask with_entropy_grad"
    ),
    "verl.vocab_parallel_log_probs_from_logits": "logits labels",
    "verl.vocab_parallel_entropy": "vocab_parallel_logits",
    "verl.vocab_parallel_entropy_with_chunking": "vocab_parallel_logits chunk_size",
    "verl.linear_cross_entropy": "hidden weight labels temperature reduction dist_process_group",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_peer(name):
    adapter, _, function = name.partition(".")
    ours = getattr(importlib.import_module(f"megatron_egrsd.vocab_parallel.adapters.{adapter}"), function)
    parameters = inspect.signature(getattr(ours, "apply", ours)).parameters.values()
    # what is ours beyond them can be given by name only
    own = {"vocab_size", "inplace_backward", "options"} if adapter == "megatron_lm" else set()
    assert [p.name for p in parameters if p.name not in own] == PARAMETERS[name].split()
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters if p.name in own)


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A package with slime's modules, not imported yet: one defines the function, one binds it at import."""
    files = {
        "slime/__init__.py": "",
        "slime/utils/__init__.py": "",
        "slime/utils/ppo_utils.py": "def calculate_log_probs_and_entropy(*args): return 'theirs'",
        "slime/loss.py": """
            from slime.utils.ppo_utils import calculate_log_probs_and_entropy as bound
            TABLE = {"not a module's name": bound}
        """,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(patching._AfterImport, "waiting", {})
    importlib.invalidate_caches()
    yield tmp_path / "slime"
    for name in [n for n in sys.modules if n.partition(".")[0] == "slime"]:
        del sys.modules[name]


@pytest.mark.parametrize("when", ["before the peer is imported", "after", "before it is looked for"])
def test_install_reaches_names_bound_by_an_import(when, peer):
    from megatron_egrsd.vocab_parallel.adapters import slime

    if when == "after":
        importlib.import_module("slime.loss")
    slime.install(args=None)
    if when == "before it is looked for":
        assert importlib.util.find_spec("slime.utils.ppo_utils")
    loss = importlib.import_module("slime.loss")
    assert loss.bound is slime.calculate_log_probs_and_entropy
    defined = importlib.import_module("slime.utils.ppo_utils").calculate_log_probs_and_entropy
    assert defined is slime.calculate_log_probs_and_entropy


def test_a_peer_that_has_moved_the_function_is_an_error_at_every_import(peer):
    from megatron_egrsd.vocab_parallel.adapters import slime

    (peer / "utils/ppo_utils.py").write_text("")
    slime.install()
    for _ in range(2):
        with pytest.raises(AttributeError, match="another version"):
            importlib.import_module("slime.utils.ppo_utils")


def test_a_name_of_newer_versions_is_set_where_it_is(peer):
    ours = object()
    names = {"calculate_log_probs_and_entropy": ours, "more": ours}
    patching.replace("slime.utils.ppo_utils", names, newer={"more"})
    module = importlib.import_module("slime.utils.ppo_utils")
    assert module.calculate_log_probs_and_entropy is ours and not hasattr(module, "more")
    module.more = object()
    patching.replace("slime.utils.ppo_utils", names, newer={"more"})
    assert module.more is ours
