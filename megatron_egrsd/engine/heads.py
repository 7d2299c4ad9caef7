"""Compute on the last pipeline stage, at the response tokens of a micro-batch: scores, and a teacher's divergence.

A head gets the hidden states [r, D] of the rows that predict this context-parallel rank's r response tokens, the shard
of the LM head [V / TP, D] and the micro-batch, and returns one row of [r] for each of its results.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_egrsd.data.packing import MicroBatch
from megatron_egrsd.engine.context_parallel import gather_columns
from megatron_egrsd.vocab_parallel import DivergenceForm, linear_divergence, linear_log_prob_and_entropy

Head = Callable[[torch.Tensor, torch.Tensor, MicroBatch], torch.Tensor]


@dataclass(frozen=True)
class ScoringHead:
    """Log-prob and entropy [2, r]. `group` is the tensor-parallel one, None if it has a single rank."""

    group: dist.ProcessGroup | None
    vocab_size: int
    temperature: float

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        targets = batch.targets.index_select(0, batch.own)
        return torch.stack(linear_log_prob_and_entropy(hidden, weight, targets, **vars(self)))


@dataclass
class TeacherStates:
    """A teacher's hidden states at the response tokens, and its LM head: its distributions before they are computed.

    Only the last pipeline stage holds any, of its context-parallel rank's share of each response. The head is the
    model's own memory if the student's is the same.
    """

    form: DivergenceForm
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # by sample, [tokens, D]
    weight: torch.Tensor | None = None  # [V / TP, D]

    def at(self, batch: MicroBatch) -> torch.Tensor:
        """Return [r, D] of the rows of a micro-batch of student sequences."""
        assert self.weight is not None
        rows = [self.hidden[i] for i in batch.members]
        return torch.cat(rows) if rows else self.weight.new_zeros(0, self.weight.shape[1])


@dataclass(frozen=True)
class HoldingHead:
    """Scores of the teacher's sequences, while its hidden states are kept in `states`.

    Args:
        owned: The response tokens of each sample that this rank holds in the student's sequence: another prompt before
            the response divides it otherwise among context-parallel ranks.
        context_group: Those ranks.
        copy_weight: Whether the LM head will change before the states are used.
    """

    score: ScoringHead
    states: TeacherStates
    owned: dict[int, torch.Tensor]
    context_group: dist.ProcessGroup
    copy_weight: bool

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        whole = gather_columns(hidden.detach().t(), batch, self.context_group).t()
        for i, rows in batch.unpack(whole).items():
            self.states.hidden[i] = rows.index_select(0, self.owned[i].to(rows.device))
        if self.states.weight is None:
            self.states.weight = weight.detach().clone() if self.copy_weight else weight.detach()
        return self.score(hidden, weight, batch)


@dataclass(frozen=True)
class DivergenceHead:
    """Log-prob, entropy, and divergence from a teacher [3, r].

    Without `log_prob_grad` the first row has no gradient, which saves its backward pass.
    """

    score: ScoringHead
    states: TeacherStates
    log_prob_grad: bool

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.log_prob_grad):
            scores = self.score(hidden, weight, batch)
        teacher, teacher_weight = self.states.at(batch), self.states.weight
        assert teacher_weight is not None
        if teacher_weight.data_ptr() == weight.data_ptr():
            teacher_weight = weight  # read once for both
        value, _ = linear_divergence(
            teacher, teacher_weight, hidden, weight, **vars(self.states.form), **vars(self.score)
        )
        return torch.cat([scores, value[None]])
