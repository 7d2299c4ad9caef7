"""Plain-torch layers for megatron-core's ModuleSpec, used where Transformer Engine is not: a norm and an attention."""

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_egrsd.engine.context_parallel import gather_tokens


class RMSNorm(torch.nn.Module):
    """RMSNorm in fp32 whose weight is marked for the gradient reduction of sequence parallelism.

    megatron-core's own fallback (WrappedTorchNorm) refuses sequence_parallel.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class CausalAttention(torch.nn.Module):
    """Causal core attention over packed sequences with torch's SDPA; the stock DotProductAttention knows no packing.

    query [T, N, D], key and value [T, G, D] with `packed_seq_params` (thd); returns [T, N * D]. Sequences of equal
    padded length run as one SDPA call: being causal, it never lets a token see the padding behind it.

    Under context parallelism T are this rank's tokens (data/zigzag.py). Keys and values of all ranks are gathered, and
    each of its two chunks of a sequence attends to the keys up to its own end.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None,
                 softmax_scale=None, cp_comm_type=None, pg_collection=None, **kwargs):  # fmt: skip
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None):  # fmt: skip
        cu_seqlens, group = packed_seq_params.cu_seqlens_q, parallel_state.get_context_parallel_group()
        rank, size = group.rank(), group.size()
        lengths = cu_seqlens.diff().tolist()
        chunks, held = 1, [0]
        if size > 1:
            chunks, held = 2 * size, [rank, 2 * size - 1 - rank]
            both = gather_tokens(torch.cat([key, value], 1), cu_seqlens, group)
            key, value = both.chunk(2, 1)
        queries = query.split([n // chunks for n in lengths for _ in held])
        keys, values = key.split(lengths), value.split(lengths)
        outputs = [None] * len(queries)
        for members in _buckets(lengths):
            for place, chunk in enumerate(held):
                spans = [lengths[i] // chunks for i in members]
                ends = [(chunk + 1) * n for n in spans]
                q = _padded([queries[i * len(held) + place] for i in members])
                k, v = (_padded([x[i][:end] for i, end in zip(members, ends, strict=True)]) for x in (keys, values))
                mask = _visible(q, k, [chunk * n for n in spans]) if chunk else None
                o = F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=not chunk, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
                )
                o = o.transpose(1, 2).flatten(2)
                for row, i in enumerate(members):
                    outputs[i * len(held) + place] = o[row, : spans[row]]
        return torch.cat(outputs)


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """[L_b, heads, D] each -> [B, heads, L, D]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)


def _visible(q: torch.Tensor, k: torch.Tensor, before: list[int]) -> torch.Tensor:
    """[B, 1, Lq, Lk] bool: query i of row b sees the `before[b]` keys ahead of the chunk and the chunk's up to its own."""
    last = torch.tensor(before, device=q.device)[:, None] + torch.arange(q.shape[2], device=q.device)
    return (torch.arange(k.shape[2], device=q.device) <= last[..., None])[:, None]


def _buckets(lengths: list[int], waste: float = 1.3) -> list[list[int]]:
    """Indices in groups whose longest member is at most `waste` times the shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and lengths[groups[-1][0]] <= waste * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
