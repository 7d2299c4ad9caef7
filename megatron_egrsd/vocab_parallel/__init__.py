"""Vocab-parallel log-probability and entropy: one read of the logits, one collective, no collective in backward.

The package works in any Megatron-style project: it imports only torch, and takes the tensor-parallel process group.
`docs/guides/reuse.md` shows the call from Megatron-LM, slime and verl; `docs/measurements/performance.md` the times.
"""

from megatron_egrsd.vocab_parallel.linear import linear_log_prob_and_entropy
from megatron_egrsd.vocab_parallel.log_prob import LogRatio, log_prob_and_entropy, log_ratio
from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "LogRatio", "linear_log_prob_and_entropy", "log_prob_and_entropy", "log_ratio"]
