"""Vocab-parallel log-probability, entropy and divergence: one collective in forward, none in backward.

The package works in any Megatron-style project: it imports only torch, and takes the tensor-parallel process group.
`adapters/` has the functions of Megatron-LM, slime, verl, NeMo-RL and AReaL at their own signatures;
`docs/guides/reuse.md` shows their use, `docs/measurements/performance.md` the times.
"""

from megatron_egrsd.vocab_parallel.cross_entropy import cross_entropy
from megatron_egrsd.vocab_parallel.divergence import Divergence, divergence
from megatron_egrsd.vocab_parallel.form import DivergenceForm
from megatron_egrsd.vocab_parallel.gather import gather_log_probs, log_softmax
from megatron_egrsd.vocab_parallel.linear import linear_log_prob_and_entropy, linear_token_statistics
from megatron_egrsd.vocab_parallel.linear_divergence import linear_divergence
from megatron_egrsd.vocab_parallel.log_prob import (
    LogRatio,
    TokenStatistics,
    log_prob_and_entropy,
    log_ratio,
    token_statistics,
)
from megatron_egrsd.vocab_parallel.masked import masked_log_prob
from megatron_egrsd.vocab_parallel.shard import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "Divergence",
    "DivergenceForm",
    "LogRatio",
    "TokenStatistics",
    "cross_entropy",
    "divergence",
    "gather_log_probs",
    "linear_divergence",
    "linear_log_prob_and_entropy",
    "linear_token_statistics",
    "log_prob_and_entropy",
    "log_ratio",
    "log_softmax",
    "masked_log_prob",
    "token_statistics",
]
