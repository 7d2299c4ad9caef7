"""The adapters of examples/reuse at slime's, verl's and Megatron-LM's signatures, against fp64 written from scratch."""

import importlib.util
from pathlib import Path

import torch

from tests.ranks import run_ranks

REUSE = Path(__file__).parents[2] / "examples" / "reuse"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, REUSE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reference(logits, labels, g, h):
    """log-prob, entropy and gradient by the definitions, in fp64, over the whole vocabulary."""
    z = logits.double().requires_grad_()
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    log_prob = p.gather(-1, labels[:, None])[:, 0].log()
    entropy = -(p * p.log()).sum(-1)
    ((log_prob * g).sum() + (entropy * h).sum()).backward()
    return log_prob.detach(), entropy.detach(), z.grad


def _adapters(rank, world_size):
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(11, 96, generator=g) * 3, torch.randint(0, 96, (11,), generator=g)
    g_lp, g_h = torch.randn(2, 11, generator=g)
    log_prob, entropy, gradient = _reference(logits, labels, g_lp, g_h)
    own_gradient = gradient.chunk(world_size, -1)[rank]

    def check(call):
        leaf = logits.chunk(world_size, -1)[rank].contiguous().requires_grad_()
        lp, h = call(leaf)
        ((lp * g_lp).sum() + (h * g_h).sum()).backward()
        assert (lp - log_prob).abs().max() < 1e-5 and (h - entropy).abs().max() < 5e-6
        assert (leaf.grad - own_gradient).norm() <= 1e-6 * own_gradient.norm()

    slime, verl = _load("slime_adapter"), _load("verl_adapter")
    group = parallel_state.get_tensor_model_parallel_group()

    def as_slime(leaf):
        lp, h = slime.calculate_log_probs_and_entropy(leaf, labels, group, with_entropy=True, chunk_size=4)
        assert lp.shape == (11, 1)
        return lp.squeeze(-1), h

    check(as_slime)
    check(lambda leaf: (verl.vocab_parallel_log_probs_from_logits(leaf, labels), verl.vocab_parallel_entropy(leaf)))
    check(lambda leaf: verl.log_probs_and_entropy(leaf, labels))
    assert slime.calculate_log_probs_and_entropy(logits.chunk(world_size, -1)[rank], labels, group)[1] is None
    dist.destroy_process_group()


def test_slime_and_verl_signatures():
    run_ranks(_adapters, 2)


def _megatron_loss(rank, world_size):
    import torch.distributed as dist

    differences = _load("megatron_loss").compare()
    dist.destroy_process_group()
    return differences


def test_megatron_loss_function():
    for loss, gradient in run_ranks(_megatron_loss, 2):
        assert loss < 1e-6 and gradient < 1e-6
