"""Context parallelism: the split is megatron-core's, and attention over split sequences equals that over whole ones."""

import types

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks

HEADS, GROUPS, WIDTH = 4, 2, 8
# Ragged, among them shorter than 2 x CP: each is padded to a multiple of it.
LENGTHS = [1, 70, 3, 64, 21, 2, 33]


def _cu_seqlens(size: int) -> torch.Tensor:
    return torch.tensor([0, *(-(-n // (2 * size)) * 2 * size for n in LENGTHS)]).cumsum(0, dtype=torch.int32)


def _inputs(total: int) -> list[torch.Tensor]:
    """Return queries, keys, values and the gradient of the output, fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, WIDTH), (HEADS * WIDTH,))
    return [torch.randn(total, *shape, generator=generator) for shape in shapes]


def _attend(rank, world_size):
    """Return (output, gradients of query, key and value) at this rank's tokens."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_egrsd.config import ParallelConfig
    from megatron_egrsd.data.zigzag import zigzag
    from megatron_egrsd.engine import distributed
    from megatron_egrsd.engine.layers import CausalAttention

    distributed.initialize(ParallelConfig(context=world_size), seed=0)
    cu_seqlens = _cu_seqlens(world_size)
    own = zigzag(cu_seqlens, rank, world_size)
    *qkv, gradient = (x[own] for x in _inputs(int(cu_seqlens[-1])))
    for x in qkv:
        x.requires_grad_()
    attention = CausalAttention(types.SimpleNamespace(kv_channels=WIDTH), 1, None, "self")
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    output = attention(*qkv, packed_seq_params=packed)
    output.backward(gradient)
    distributed.shutdown()
    return [own.numpy(), output.detach().numpy(), *(x.grad.numpy() for x in qkv)]


def _reference(cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """Compute `_attend`'s results in fp64, sequence by sequence, with explicit scores."""
    *qkv, gradient = (x.double() for x in _inputs(int(cu_seqlens[-1])))
    for x in qkv:
        x.requires_grad_()
    outputs = []
    for q, k, v in zip(*(x.split(cu_seqlens.diff().tolist()) for x in qkv), strict=True):
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / WIDTH**0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", F.softmax(scores, -1), v).flatten(1))
    output = torch.cat(outputs)
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in qkv)]


@pytest.mark.parametrize("size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_attention_and_its_gradients(size):
    found = run_ranks(_attend, size)
    places = torch.cat([torch.from_numpy(own) for own, *_ in found])
    expected = _reference(_cu_seqlens(size))
    assert places.sort().values.equal(torch.arange(expected[0].shape[0]))
    for i, whole in enumerate(expected, 1):
        parts = torch.cat([torch.from_numpy(values[i]) for values in found])
        torch.testing.assert_close(parts.double(), whole[places], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rotary_embedding_is_megatron_cores(size):
    """The engine's embedding of all sequences at once equals megatron-core's loop over the sequences."""
    from megatron.core.models.common.embeddings import rope_utils

    import megatron_egrsd.engine  # noqa: F401  (puts ours in place)

    cu_seqlens = _cu_seqlens(size)
    tokens = torch.randn(int(cu_seqlens[-1]) // size, HEADS, WIDTH)
    angles = torch.randn(int(cu_seqlens.diff().max()), 1, 1, WIDTH)
    for rank in range(size):
        group = types.SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size)
        ours = rope_utils._apply_rotary_pos_emb_thd
        expected = ours.__wrapped__(tokens, cu_seqlens, angles, cp_group=group)
        assert torch.equal(ours(tokens, cu_seqlens, angles, cp_group=group), expected)
