"""NeMo-RL's distributed log-probs at their own signatures: autograd functions there, so classes with `apply` here.

    from megatron_egrsd.vocab_parallel.adapters import nemo_rl
    nemo_rl.install()            # at the top of nemo_rl/models/policy/workers/megatron_policy_worker.py

A target outside the vocabulary has log-prob 0, as in NeMo-RL, and no gradient.
"""

from typing import Any

import torch

from megatron_egrsd.vocab_parallel import gather_log_probs, log_softmax, token_statistics
from megatron_egrsd.vocab_parallel.adapters.patching import replace
from megatron_egrsd.vocab_parallel.adapters.tensor_parallel import check_start


class DistributedLogprob:
    """log softmax(logits)[target]: [B, S] fp32."""

    @staticmethod
    def apply(
        vocab_parallel_logits: torch.Tensor,
        target: torch.Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        group: Any,
        inference_only: bool = False,
    ) -> torch.Tensor:
        check_start(vocab_start_index, vocab_parallel_logits, group)
        logits = vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits
        return token_statistics(logits, target.long(), group=group, out_of_vocabulary="zero").log_prob


class ChunkedDistributedLogprob:
    """`DistributedLogprob` with a chunk size, which has no effect: there are no temporaries to bound."""

    @staticmethod
    def apply(
        vocab_parallel_logits: torch.Tensor,
        target: torch.Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: Any,
        inference_only: bool = False,
    ) -> torch.Tensor:
        return DistributedLogprob.apply(
            vocab_parallel_logits, target, vocab_start_index, vocab_end_index, tp_group, inference_only
        )


class ChunkedDistributedGatherLogprob:
    """log softmax(logits) at ids [B, S, K]: [B, S, K] fp32, from one read for all K."""

    @staticmethod
    def apply(
        vocab_parallel_logits: torch.Tensor,
        global_indices: torch.Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
        chunk_size: int,
        tp_group: Any,
        inference_only: bool = False,
    ) -> torch.Tensor:
        check_start(vocab_start_index, vocab_parallel_logits, tp_group)
        logits = vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits
        return gather_log_probs(logits, global_indices.long(), group=tp_group, out_of_vocabulary="zero")


class ChunkedDistributedEntropy:
    """sum p log p of softmax(logits), which is minus the entropy: [B, S] fp32."""

    @staticmethod
    def apply(
        vocab_parallel_logits: torch.Tensor, chunk_size: int, tp_group: Any, inference_only: bool = False
    ) -> torch.Tensor:
        logits = vocab_parallel_logits.detach() if inference_only else vocab_parallel_logits
        return -token_statistics(logits, group=tp_group, entropy_grad=not inference_only).entropy


def _compute_distributed_log_softmax_with_grad(vocab_parallel_logits: torch.Tensor, group: Any) -> torch.Tensor:
    """Return this rank's columns of log softmax(logits), in the logits' dtype."""
    return log_softmax(vocab_parallel_logits, group=group).to(vocab_parallel_logits.dtype)


@torch.no_grad()
def _compute_distributed_log_softmax(vocab_parallel_logits: torch.Tensor, group: Any) -> torch.Tensor:
    return _compute_distributed_log_softmax_with_grad(vocab_parallel_logits, group)


def install() -> None:
    """Replace the functions in NeMo-RL, in this process. Top-k and top-p sampling keep NeMo-RL's own."""
    replacements = (
        DistributedLogprob,
        ChunkedDistributedLogprob,
        ChunkedDistributedGatherLogprob,
        ChunkedDistributedEntropy,
        _compute_distributed_log_softmax,
        _compute_distributed_log_softmax_with_grad,
    )
    replace("nemo_rl.distributed.model_utils", {r.__name__: r for r in replacements})
