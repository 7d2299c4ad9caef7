"""The interface between an objective and the training loop.

The loop knows nothing of an objective but its methods on packed tokens and what it needs; docs/guides/extending.md adds
one.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist

from megatron_egrsd.objectives.signal import History, advantages, shaped_rewards
from megatron_egrsd.vocab_parallel import DivergenceForm

if TYPE_CHECKING:
    from megatron_egrsd.config import ObjectiveConfig
    from megatron_egrsd.data.samples import Rollout


@dataclass(frozen=True)
class Tokens:
    """T response tokens of B rollouts, end to end; no prompts, no padding.

    Tensors are [T] fp32 without gradient, log-probs and entropies in nats. The student is the policy before the
    update, the teacher the same network with the privileged context, at the same temperature.
    """

    cu_seqlens: torch.Tensor  # [B + 1] int32: rollout b is tokens cu_seqlens[b] .. cu_seqlens[b + 1]
    advantage: torch.Tensor  # what `advantages` gave the rollout, on each of its tokens
    teacher_log_prob: torch.Tensor | None = None  # of the sampled token; None without `needs_teacher`
    teacher_entropy: torch.Tensor | None = None  # of the full next-token distribution
    student_log_prob: torch.Tensor | None = None  # None in `prepare` without `needs_student`
    student_entropy: torch.Tensor | None = None
    divergence: torch.Tensor | None = None  # from the teacher, as the objective asks for it; there with the student's
    context_log_prob: torch.Tensor | None = None  # [K, T] of the sampled token after the teacher's further contexts,
    # NaN if a rollout has fewer than K; None without `needs_contexts`
    fields: dict[str, torch.Tensor] = field(default_factory=dict)  # what `prepare` returned


def batch_tokens(
    advantage: list[float], lengths: list[int], scores: dict[str, torch.Tensor], device: torch.device | None = None
) -> Tokens:
    """Lay rollouts end to end: the signal and the response length of each, and scores [T] by their name in `Tokens`."""
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    signal = torch.tensor(advantage, dtype=torch.float32, device=device).repeat_interleave(cu_seqlens.diff())
    return Tokens(cu_seqlens, signal, **scores)


@dataclass(frozen=True)
class Objective:
    """The weight W_t of every response token in the policy loss (loss.policy_loss), V_t in a divergence, or both.

    Pure functions: equal arguments give equal results on every rank, whatever the packing, and nothing is kept between
    calls but `history`, which the loop hands on. A subclass is a frozen dataclass as well; the fields that it adds are
    `objective.options`.
    """

    config: "ObjectiveConfig"
    history: History = field(default=History(), kw_only=True)

    # Class attributes or properties, no fields.
    needs_teacher = True  # run the teacher; what it reads must then be in the data
    needs_rollouts = True  # False: nothing is sampled, the reference solutions are trained, one a prompt
    needs_contexts = False  # the teacher reads data.teacher_context "contrast", a right rollout and wrong ones
    needs_student = False  # `prepare` sees the student's scores; costs one more forward pass a step
    trains_all = False  # True: a rollout with a signal of exactly 0 is trained as well
    needs_token_mean = False  # its loss is a mean of its own, made of objective.loss_normalization "token_mean"
    divergence: ClassVar[DivergenceForm | None] = None  # from the teacher, at every token; needs `needs_teacher`

    def advantages(self, rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        """Return the signal A of each rollout, [R] fp32, from shaped rewards [R] and group_ids [R] int, one a prompt.

        A rollout with a signal of exactly 0 is scored but not trained, unless the objective `trains_all`.
        """
        return advantages(rewards, group_ids, self.config, self.history)

    def without_context(self, signal: torch.Tensor) -> torch.Tensor:
        """Return the signals of rollouts whose teacher lacks the rollouts to read; by default 0: not trained."""
        return torch.zeros_like(signal)

    def prepare(
        self, tokens: Tokens, *, vocab_size: int, group: dist.ProcessGroup | None = None
    ) -> dict[str, torch.Tensor]:
        """Return, once a step, [T] tensors by name from this rank's share of the batch: `tokens.fields` of `weight`.

        `group` holds the data-parallel ranks, for statistics over all tokens (egrsd.entropy_quantile takes it);
        None means that `tokens` are all there are. "gate" goes into dumps and onto the token page.
        """
        return {}

    def remember(self, tokens: Tokens, *, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Return numbers by name for later steps, once a step, from what `prepare` got and returned (`tokens.fields`).

        Equal on every rank. They are added to `history.notes`, logged as "history/name", and kept in checkpoints and
        scored dumps.
        """
        return {}

    def weight(self, tokens: Tokens) -> torch.Tensor:
        """Return W, [T] fp32, of one micro-batch: whole rollouts, chosen by the packing.

        An objective with a `divergence` may leave it out: its loss is the divergence alone.
        """
        if self.divergence is None:
            raise NotImplementedError(f"{type(self).__name__} defines no weight(tokens)")
        return torch.zeros_like(tokens.advantage)

    def divergence_weight(self, tokens: Tokens) -> torch.Tensor:
        """Return V, [T] fp32, of the same micro-batch: the weight of each token's divergence, which is to fall."""
        return torch.ones_like(tokens.advantage)

    @property
    def has_policy_loss(self) -> bool:
        """Return whether the objective weighs log-probs of sampled tokens: whether it defines `weight`."""
        return type(self).weight is not Objective.weight

    def metrics(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """Return [T] tensors by name, such as "gate/mean"; their means over trained tokens are logged every step."""
        return {}


def rollout_advantages(
    rollouts: "list[Rollout]", objective: Objective, max_response_tokens: int
) -> tuple[list[float], list[float]]:
    """Return the shaped reward of each rollout of a batch, and the signal that `objective` makes of it.

    The objective decides on rollouts whose teacher should read other rollouts, and cannot (`without_context`).
    """
    shaped = shaped_rewards(rollouts, objective.config, max_response_tokens)
    groups = torch.tensor([r.group for r in rollouts])
    signal = objective.advantages(torch.tensor(shaped), groups)
    alone = torch.tensor([r.contexts == [] for r in rollouts])
    return shaped, torch.where(alone, objective.without_context(signal), signal).tolist()


def is_trained(signal: float, objective: Objective) -> bool:
    """Return whether a rollout of this signal is trained; the others are scored alone."""
    return bool(signal or objective.config.kl_coef or objective.trains_all)


def weigh(objective: Objective, tokens: Tokens, *, vocab_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weight a whole batch on one process: W [T] fp32, and the fields that `prepare` made."""
    fields = objective.prepare(tokens, vocab_size=vocab_size)
    return objective.weight(replace(tokens, fields=fields)).float(), fields
