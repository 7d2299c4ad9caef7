"""Plain-torch layers for megatron-core's ModuleSpec, used where Transformer Engine is not: a norm and an attention."""

import math

import torch
import torch.nn.functional as F


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
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None,
                 softmax_scale=None, cp_comm_type=None, pg_collection=None, **kwargs):  # fmt: skip
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None):  # fmt: skip
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = [None] * len(lengths)
        spans = [x.split(lengths) for x in (query, key, value)]
        for members in _buckets(lengths):
            q, k, v = (torch.nn.utils.rnn.pad_sequence([x[i] for i in members], batch_first=True) for x in spans)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, L, D]
            o = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            o = o.transpose(1, 2).flatten(2)
            for row, i in enumerate(members):
                outputs[i] = o[row, : lengths[i]]
        return torch.cat(outputs)


def _buckets(lengths: list[int], waste: float = 1.3) -> list[list[int]]:
    """Indices in groups whose longest member is at most `waste` times the shortest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and lengths[groups[-1][0]] <= waste * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
