"""The divergence on real gloo groups: TP 2 and 4 against one shard, and the collectives counted."""

import io

import pytest
import torch

from tests.parallel.test_vocab_parallel import _count_collectives
from tests.ranks import run_ranks
from tests.unit.divergence_cases import FORMS, hard_pairs, near_pairs

VOCAB, COLUMNS = 1003, 1024


def _cases():
    pairs = {name: pair for name, pair in hard_pairs(VOCAB).items() if name not in ("range 1e4", "constant")}
    pairs |= {f"near, {name}": pair for name, pair in near_pairs(VOCAB).items()}
    padding = lambda x: torch.cat([x, torch.full((len(x), COLUMNS - VOCAB), 50.0)], -1)  # noqa: E731
    return {name: tuple(map(padding, pair)) for name, pair in pairs.items()}


def _all_forms(rank, world_size):
    """Return this rank's value, entropy, gradient and numbers of collectives for every case and form."""
    import torch.distributed as dist

    from megatron_egrsd.vocab_parallel import divergence

    group = None
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        group = dist.group.WORLD
    counts, out = _count_collectives(), {}
    for name, (teacher, student) in _cases().items():
        for form, arguments in FORMS.items():
            mine = student.chunk(world_size, -1)[rank].clone().requires_grad_()
            counts.clear()
            value, entropy = divergence(
                teacher.chunk(world_size, -1)[rank], mine, group=group, vocab_size=VOCAB, temperature=0.9, **arguments
            )
            forward = sum(counts.values())
            counts.clear()
            value.sum().backward()
            out[f"{form}, {name}"] = (value.detach(), entropy, mine.grad, forward, sum(counts.values()))
    if world_size > 1:
        dist.destroy_process_group()
    file = io.BytesIO()  # a tensor sent directly is a file of a process that has ended by then
    torch.save(out, file)
    return file.getvalue()


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_agree_with_one(ranks):
    one = torch.load(io.BytesIO(_all_forms(0, 1)), weights_only=True)
    parts = [torch.load(io.BytesIO(x), weights_only=True) for x in run_ranks(_all_forms, ranks)]
    for name, (value, entropy, gradient, _, _) in one.items():
        finite = value.isfinite()
        near = "near" in name and "top" not in name  # divergences of 1e-9
        for part in parts:
            torch.testing.assert_close(part[name][0], value, rtol=0.02 if near else 2e-6, atol=0 if near else 1e-6)
            torch.testing.assert_close(part[name][1], entropy, rtol=0, atol=2e-6, msg=name)
        joined = torch.cat([part[name][2] for part in parts], -1)
        scale = value[finite].abs().clamp_min(1.0)[:, None]
        difference = (joined - gradient)[finite].abs()
        assert bool((difference <= (1e-9 if near else 1e-6) * scale).all()), name
        assert bool((joined[..., VOCAB:] == 0).all())
        forward = 1 if name.startswith(("forward,", "reverse,", "top")) else 2
        assert all(part[name][3] == forward and part[name][4] == 0 for part in parts), name


def _linear(rank, world_size):
    """Return values and the student's gradients of the linear form, plain and with sequence parallelism."""
    import torch.distributed as dist

    from megatron_egrsd.vocab_parallel import linear_divergence

    group = None
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        group = dist.group.WORLD
    g = torch.Generator().manual_seed(0)
    teacher, hidden = torch.randn(2, 4, 3, 16, generator=g)
    weight, out = torch.randn(COLUMNS, 16, generator=g).chunk(world_size)[rank].contiguous(), {}
    for form in ("forward", "reverse", "jsd", "forward clipped", "top 5"):
        for sequence_parallel in (False, True):
            inputs = (teacher, hidden)
            if sequence_parallel:
                inputs = tuple(x.chunk(world_size)[rank] for x in inputs)
            mine, head = inputs[1].clone().requires_grad_(), weight.clone().requires_grad_()
            value, _ = linear_divergence(
                inputs[0], head, mine, head, group=group, vocab_size=VOCAB, chunk_size=100,
                sequence_parallel=sequence_parallel, **FORMS[form],
            )  # fmt: skip
            value.sum().backward()
            out[form, sequence_parallel] = (value.detach(), mine.grad, head.grad)
    if world_size > 1:
        dist.destroy_process_group()
    file = io.BytesIO()
    torch.save(list(out.values()), file)
    return file.getvalue()


@pytest.mark.heavy
def test_the_linear_form_agrees_with_one_shard():
    one = torch.load(io.BytesIO(_linear(0, 1)), weights_only=True)
    parts = [torch.load(io.BytesIO(x), weights_only=True) for x in run_ranks(_linear, 2)]
    for i, (value, hidden_grad, weight_grad) in enumerate(one):
        values, hidden_grads, weight_grads = zip(*(part[i] for part in parts), strict=True)
        assert all(torch.allclose(x, value, rtol=2e-6, atol=1e-6) for x in values)
        joined = torch.cat(hidden_grads) if i % 2 else hidden_grads[1]
        assert (joined - hidden_grad).norm() <= 2e-6 * hidden_grad.norm()
        assert (torch.cat(weight_grads) - weight_grad).norm() <= 2e-6 * weight_grad.norm()
