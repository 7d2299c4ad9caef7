"""The policy loss on token weights, the divergence loss, and the number that each token's term is divided by.

Tensors are [T]: the response tokens of B rollouts, end to end; no prompts, no padding. Log-probs are in nats.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_egrsd.config import ObjectiveConfig


def loss_normalizer(
    response_lengths: torch.Tensor, config: "ObjectiveConfig", *, num_tokens: int, num_sequences: int
) -> torch.Tensor:
    """Return the divisor of each token's loss term, [T] fp32: N of docs/reference/method.md, known before any pass.

    `response_lengths` [B] of this part of the batch; `num_tokens` and `num_sequences` of the global batch.
    """
    lengths = response_lengths.float()
    per_sequence = {
        "token_mean": torch.full_like(lengths, num_tokens),
        "seq_mean": lengths * num_sequences,
        "fixed": torch.full_like(lengths, config.fixed_length * num_sequences),
    }[config.loss_normalization]
    return per_sequence.repeat_interleave(response_lengths.long())


def importance_weight(
    old_log_prob: torch.Tensor, rollout_log_prob: torch.Tensor | None, config: "ObjectiveConfig"
) -> torch.Tensor:
    """Return c = min(pi_old / pi_rollout, C), [T] fp32, if `importance_cap` = C is set, else 1.

    Truncated importance sampling: for what SGLang and the engine compute differently, and for the updates between them.
    """
    old = old_log_prob.detach().float()
    if config.importance_cap is None:
        return torch.ones_like(old)
    if rollout_log_prob is None:
        raise ValueError("importance_cap is set, so the loss needs rollout_log_prob")
    return torch.exp(old - rollout_log_prob.detach().float()).clamp(max=config.importance_cap)


def divergence_loss(
    divergence: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor, normalizer: torch.Tensor | float
) -> torch.Tensor:
    """Return L = sum_t c V_t D_t / N, with D the divergence from the teacher; [T] each.

    V and the importance weight c are constants. If V is positive the divergence falls; if V is negative it rises.
    """
    return (importance.detach() * weight.detach().float() * divergence / normalizer).sum()


@dataclass(frozen=True)
class PolicyLoss:
    """The policy loss, `loss`, which carries the gradient; the rest are detached sums over the tokens, for metrics."""

    loss: torch.Tensor
    clipped: torch.Tensor  # tokens whose policy ratio was clipped
    importance: torch.Tensor  # truncated pi_old / pi_rollout; the token count if that is off
    kl: torch.Tensor  # estimates of the KL divergence to the reference, nats; 0 if that is off


def policy_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    weight: torch.Tensor,
    normalizer: torch.Tensor | float,
    config: "ObjectiveConfig",
    *,
    rollout_log_prob: torch.Tensor | None = None,
    reference_log_prob: torch.Tensor | None = None,
) -> PolicyLoss:
    """Return L = -sum_t c * s_t / N with the weights W detached. All tensors [T]; N is `normalizer`.

    s_t = W log pi_theta for `loss` = "reinforce" (EGRSD, arXiv 2605.13255, eq. 7), and for "ppo"
    min(rho W, clip(rho, 1 - eps_lo, 1 + eps_hi) W), rho = pi_theta / pi_old (PPO, arXiv 1707.06347, eq. 7). Their
    gradients are equal if pi_theta is pi_old, as with one update a batch.
    c is `importance_weight`.

    If `kl_coef` is positive (it needs `reference_log_prob`), plus kl_coef * sum_t (e^d - d - 1) / N with
    d = log pi_ref - log pi_theta: GRPO's estimate of KL(pi_theta | pi_ref) (arXiv 2402.03300, eq. 4), never negative.
    """
    log_prob, old, w = log_prob.float(), old_log_prob.detach().float(), weight.detach().float()
    if config.loss == "reinforce":
        surrogate, was_clipped = log_prob * w, torch.zeros_like(w, dtype=torch.bool)
    else:
        ratio = torch.exp(log_prob - old)
        clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        surrogate, was_clipped = torch.minimum(ratio * w, clipped_ratio * w), clipped_ratio * w < ratio * w
    importance = importance_weight(old, rollout_log_prob, config)
    normalizer = torch.as_tensor(normalizer, dtype=torch.float32, device=w.device)
    loss, kl = -(importance * surrogate / normalizer).sum(), torch.zeros_like(log_prob)
    if config.kl_coef:
        if reference_log_prob is None:
            raise ValueError("kl_coef is set, so policy_loss needs reference_log_prob")
        beyond = reference_log_prob.detach().float() - log_prob
        kl = torch.expm1(beyond) - beyond
        loss = loss + config.kl_coef * (kl / normalizer).sum()
    return PolicyLoss(loss, was_clipped.sum(), importance.sum(), kl.detach().sum())
