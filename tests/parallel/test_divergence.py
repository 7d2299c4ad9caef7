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
        forward = 1 if name.startswith(("forward,", "reverse,")) else 2
        assert all(part[name][3] == forward and part[name][4] == 0 for part in parts), name
