"""Plain-torch layers for megatron-core's ModuleSpec, used if Transformer Engine is not: a norm and an attention."""

import functools
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
        lengths = tuple(cu_seqlens.diff().tolist())
        if group.size() > 1:
            key, value = gather_tokens(torch.cat([key, value], 1), cu_seqlens, group).chunk(2, 1)
        spans, calls = _calls(lengths, group.rank(), group.size(), query.dtype, query.device)
        queries, keys, values = query.split(spans), key.split(lengths), value.split(lengths)
        outputs = [None] * len(spans)
        for parts, mask in calls:
            q = _padded([queries[chunk] for chunk, _, _ in parts])
            k, v = (_padded([x[sequence][:end] for _, sequence, end in parts]) for x in (keys, values))
            if q.is_cuda and q.dtype == torch.float32:
                # No kernel for fp32 knows grouped queries; without one the probabilities of all pairs would be kept.
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            o = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            o = o.transpose(1, 2).flatten(2)
            for row, (chunk, _, _) in enumerate(parts):
                outputs[chunk] = o[row, : spans[chunk]]
        return torch.cat(outputs)


@functools.lru_cache(maxsize=1)  # all layers share a micro-batch's masks
def _calls(lengths: tuple[int, ...], rank: int, size: int, dtype: torch.dtype, device: torch.device):
    """Return (the number of queries in each of this rank's chunks, the SDPA calls over them).

    A call is a list of (chunk, sequence, keys of that sequence up to the chunk's end) and a mask [B, 1, Lq, Lk] to add
    to the scores, None if each chunk begins its sequence and so is plainly causal.
    """
    held, chunks = ([rank, 2 * size - 1 - rank], 2 * size) if size > 1 else ([0], 1)
    spans = [n // chunks for n in lengths for _ in held]
    calls = []
    for members in _buckets(lengths):
        for place, number in enumerate(held):
            parts = [(i * len(held) + place, i, (number + 1) * (lengths[i] // chunks)) for i in members]
            bounds = torch.tensor([(spans[chunk], end) for chunk, _, end in parts], device=device)
            calls.append((parts, _mask(bounds[:, 0], bounds[:, 1], dtype) if number else None))
    return spans, calls


def _mask(queries: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [B, 1, Lq, Lk]: 0 if a query may see a key, else -inf; the last of `queries` [B] is at key `ends` - 1."""
    last = (ends - queries)[:, None] + torch.arange(int(queries.max()), device=ends.device)
    hidden = torch.arange(int(ends.max()), device=ends.device) > last[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """Pad `rows`, [L_b, heads, D] each, to [B, heads, L, D]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)


def _buckets(lengths: tuple[int, ...], waste: float = 1.3) -> list[list[int]]:
    """Return indices in groups whose longest member is at most `waste` times the shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and lengths[groups[-1][0]] <= waste * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
