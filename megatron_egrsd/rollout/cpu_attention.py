"""Decode attention for SGLang on CPU: one batched SDPA call instead of one call per sequence.

SGLang's "torch_native" backend loops over the running requests in Python; with a small model and a hundred requests
that loop is 85 % of the server's time. This backend gathers the keys and values of all requests into one padded batch.
torch_native still serves prefill and the less usual cases (sliding windows, cross attention).
"""

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc


class BatchedDecodeBackend(TorchNativeAttnBackend):
    """The torch_native backend with a batched `forward_decode`."""

    def init_forward_metadata(self, forward_batch):
        """Prepare slots and mask of every cached token of the batch, once for all layers.

        slots: [B, L] int64 rows of the KV pool, L the longest running request; mask: [B, 1, 1, L] additive fp32.
        """
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode():
            return
        lengths = forward_batch.seq_lens
        longest = int(lengths.max())
        self.slots = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, :longest].long()
        beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        # Beyond a request's end the table holds stale slots. The mask removes them, so any valid row is correct.
        self.slots.masked_fill_(beyond, 0)
        self.mask = torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, -torch.inf)[:, None, None]

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        """Attend with q [B, Hq * D] and the new k, v [B, Hkv, D] (or flat). Returns [B, Hq * Dv]."""
        windowed = layer.sliding_window_size is not None and layer.sliding_window_size > -1
        if windowed or layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        batch, kv_heads = q.shape[0], layer.tp_k_head_num
        # The query heads that share a key head take the dimension of query positions: no key is repeated.
        query = q.reshape(batch, kv_heads, -1, layer.qk_head_dim)
        key = self._gather(pool.get_key_buffer(layer.layer_id))
        value = self._gather(pool.get_value_buffer(layer.layer_id))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        mask = self.mask.to(q.dtype)
        return sdpa(query, key.to(q.dtype), value.to(q.dtype), mask, scale=layer.scaling).reshape(batch, -1)

    def _gather(self, pool):
        """Gather [slots, Hkv, D] -> [B, Hkv, L, D], by index_select: ten times faster than indexing on CPU."""
        rows = pool.flatten(1).index_select(0, self.slots.flatten())
        return rows.view(*self.slots.shape, *pool.shape[1:]).transpose(1, 2)
