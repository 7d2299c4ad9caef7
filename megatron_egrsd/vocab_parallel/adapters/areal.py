"""AReaL's log-probs and entropy at their own signatures: from logits, and from the hidden states by chunks.

from megatron_egrsd.vocab_parallel.adapters import areal
areal.install()              # at the top of the training script and of its workers
"""

import importlib
import math
import sys
from typing import Any

import torch

from megatron_egrsd.vocab_parallel import linear_token_statistics, token_statistics
from megatron_egrsd.vocab_parallel.adapters.patching import replace

_LOGITS_MODULE = "areal.utils.functional.vocab_parallel"
_HEAD_MODULE = "areal.models.mcore.vocab_parallel_head"


def gather_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Return log softmax(logits / temperature)[labels], [...] fp32. `chunk_size` has no effect."""
    return token_statistics(
        logits, labels.long(), group=tp_group, temperature=temperature, out_of_vocabulary="zero"
    ).log_prob


def gather_logprobs_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
    reuse_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probs, entropy), [...] fp32, both with gradient. `chunk_size` has no effect.

    With `reuse_logits` the entropy has no gradient, and backward writes over the logits if they are no leaf and fill
    their memory. AReaL's own function overwrites them in forward already, but only fp32 on CUDA.
    """
    values = token_statistics(
        logits, labels.long(), group=tp_group, temperature=temperature, entropy_grad=not reuse_logits,
        inplace_backward=reuse_logits and _is_whole(logits), out_of_vocabulary="zero",
    )  # fmt: skip
    return values.log_prob, values.entropy


def _is_whole(logits: torch.Tensor) -> bool:
    """Return whether writing over `logits` changes nothing else: an intermediate result, or a whole view of one."""
    owner = logits if logits._base is None else logits._base
    return not owner.is_leaf and logits.is_contiguous() and logits.numel() == owner.numel()


def _vocab_parallel_logprobs(vocab_parallel_logits, labels, tp_group, temperature=1.0):
    return gather_logprobs(vocab_parallel_logits, labels, temperature, tp_group)


def _vocab_parallel_logprobs_entropy(vocab_parallel_logits, labels, tp_group, temperature=1.0):
    return gather_logprobs_entropy(vocab_parallel_logits, labels, temperature, tp_group)


def chunked_lm_head_logprobs_entropy(
    output_layer: Any,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    chunk_size: int,
    logit_scale: float = 1.0,
) -> Any:
    """Return AReaL's ChunkedLMHeadOutput of hidden [S, b, D] and an LM head, each [S * b] fp32, without the logits.

    The chunks run over the vocabulary, so `chunk_size`, AReaL's number of tokens, has no effect. As there, the log-prob
    alone has a gradient; minimum, maximum, mean and norm are those of this rank's columns, before the temperature; the
    gradient of `hidden_states` is reduced by Megatron, in its dtype. Raises NotImplementedError for a bias.
    """
    if output_layer.bias is not None or output_layer.gather_output or output_layer.config.defer_embedding_wgrad_compute:
        raise NotImplementedError("no bias, gather_output or defer_embedding_wgrad_compute: this is hidden @ weight.T")
    group = output_layer.tp_group
    regions = importlib.import_module("megatron.core.tensor_parallel")
    if output_layer.sequence_parallel:
        hidden = regions.gather_from_sequence_parallel_region(hidden_states, group=group)
    else:
        hidden = regions.copy_to_tensor_model_parallel_region(hidden_states, group=group)
    fused = output_layer.gradient_accumulation_fusion and weight.requires_grad and hasattr(weight, "main_grad")
    extremes = _Extremes()
    values = linear_token_statistics(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        group=group,
        temperature=temperature / logit_scale,
        reduce_hidden_grad=False,
        logits_dtype=torch.float32,
        grad_dtype=torch.float32 if output_layer.fp32_operands else None,
        main_grad=fused and not hasattr(weight, "__fsdp_param__"),
        out_of_vocabulary="zero",
        observe=extremes,
    )
    output_type = sys.modules[_HEAD_MODULE].ChunkedLMHeadOutput
    return output_type(values.log_prob, values.entropy, *(x * logit_scale for x in extremes.results(weight.shape[0])))


class _Extremes:
    """Minimum, maximum, mean and Euclidean norm of each token's logits, from chunks of the columns."""

    def __init__(self):
        self.low, self.high, self.total, self.square = math.inf, -math.inf, 0.0, 0.0

    def __call__(self, logits: torch.Tensor) -> None:
        low, high = logits.aminmax(dim=-1)
        self.low, self.high = low.clamp(max=self.low), high.clamp(min=self.high)
        self.total = logits.sum(-1) + self.total
        self.square = torch.linalg.vector_norm(logits, dim=-1).square() + self.square

    def results(self, columns: int) -> tuple[torch.Tensor, ...]:
        return self.low, self.high, self.total / columns, self.square.sqrt()


def install() -> None:
    """Replace the functions in AReaL, in this process, and the private ones that its tree attention imports."""
    replacements = (
        gather_logprobs, gather_logprobs_entropy, _vocab_parallel_logprobs, _vocab_parallel_logprobs_entropy
    )  # fmt: skip
    replace(_LOGITS_MODULE, {r.__name__: r for r in replacements})
    replace(_HEAD_MODULE, {"chunked_lm_head_logprobs_entropy": chunked_lm_head_logprobs_entropy})
