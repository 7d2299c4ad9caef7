"""The interface between an objective and the training loop, and the built-in family behind it.

The loop knows nothing of an objective but four methods on packed tokens; docs/extending.md shows one of your own.
"""

import traceback
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_egrsd import import_path
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objective import advantages, confidence_gate, magnitude

if TYPE_CHECKING:
    from megatron_egrsd.config import ObjectiveConfig


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
    fields: dict[str, torch.Tensor] = field(default_factory=dict)  # what `prepare` returned

    @property
    def mask(self) -> torch.Tensor:
        """[T] bool, all True: for the functions of objective.py, which also take packed rows with prompts in them."""
        return torch.ones_like(self.advantage, dtype=torch.bool)


@dataclass(frozen=True)
class Objective:
    """Gives every response token its weight W_t in the clipped policy loss (objective.policy_loss).

    Pure functions: equal arguments give equal results on every rank, whatever the packing, and nothing is kept between
    calls. A subclass is a frozen dataclass as well; the fields that it adds are `objective.options`.
    """

    config: "ObjectiveConfig"

    # Class attributes or properties, no fields.
    needs_teacher = True  # run the teacher; what it reads must then be in the data
    needs_student = False  # `prepare` sees the student's scores; costs one more forward pass a step

    def advantages(self, rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        """The signal A of each rollout, [R] fp32. rewards [R] in [0, 1], group_ids [R] int (one group a prompt).

        A rollout with a signal of exactly 0 is scored but not trained.
        """
        return advantages(rewards, group_ids, self.config)

    def prepare(
        self, tokens: Tokens, *, vocab_size: int, group: dist.ProcessGroup | None = None
    ) -> dict[str, torch.Tensor]:
        """Once a step, from this rank's share of the whole batch: [T] tensors by name, `tokens.fields` of `weight`.

        `group` holds the data-parallel ranks, for statistics over all tokens (objective.entropy_quantile takes it);
        None means that `tokens` are all there are. "gate" goes into dumps and onto the token page.
        """
        return {}

    def weight(self, tokens: Tokens) -> torch.Tensor:
        """W, [T] fp32, of one micro-batch: whole rollouts, which ones is left to the packing."""
        raise NotImplementedError(f"{type(self).__name__} defines no weight(tokens)")

    def metrics(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """[T] tensors by name, such as "gate/mean"; their means over the trained tokens are logged every step."""
        return {}


class Family(Objective):
    """GRPO, RLSD, EGRSD and CL-EGRSD: W = direction x magnitude x gate, as objective.token_weights (docs/method.md)."""

    @property
    def needs_teacher(self) -> bool:
        return self.config.mix > 0 or self.config.attenuation > 0

    def prepare(self, tokens, *, vocab_size, group=None):
        if not self.needs_teacher:
            return {}
        args = tokens.teacher_entropy, tokens.cu_seqlens, tokens.mask, self.config
        gate, _ = confidence_gate(*args, vocab_size=vocab_size, group=group)
        return {"gate": gate}

    def weight(self, tokens):
        if not self.needs_teacher:
            return tokens.advantage
        args = tokens.advantage, tokens.teacher_log_prob, tokens.student_log_prob
        return tokens.advantage * magnitude(*args, self.config) * tokens.fields["gate"]

    def metrics(self, tokens):
        if not self.needs_teacher:
            return {}
        gate = tokens.fields["gate"]
        ratio = torch.exp(torch.sign(tokens.advantage) * (tokens.teacher_log_prob - tokens.student_log_prob))
        return {
            "gate/mean": gate,
            "gate/closed_share": gate < 1 - self.config.attenuation / 2,
            "weight/clip_share": (ratio - 1).abs() > self.config.ratio_clip,
        }


def load_objective(config: "ObjectiveConfig") -> Objective:
    """The objective that `config.function` names with `config.options`; without one, the family. BadArgument if not."""
    if not config.function:
        return Family(config)
    cls = import_path.load(config.function, "objective.function")
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise BadArgument(
            f"objective.function {config.function!r} is no subclass of megatron_egrsd.weighting.Objective"
        )
    options = [f.name for f in fields(cls) if f.name != "config"]
    if unknown := [name for name in config.options if name not in options]:
        known = f"its options are {', '.join(options)}" if options else "it has no options"
        raise BadArgument(f"objective.options: {cls.__name__} has no option {unknown[0]!r}; {known}")
    try:
        return cls(config, **config.options)
    except Exception as error:
        raise BadArgument(f"objective.options of {cls.__name__}: {error}") from None


def check_objective(config: "ObjectiveConfig") -> None:
    """Load a user's objective and try it on two rollouts of 3 and 2 made-up tokens, before anything is started.

    Raises BadArgument with the place in the user's file where it fails, or with what has the wrong shape.
    """
    objective = load_objective(config)
    if not config.function:
        return
    try:
        _try(objective)
    except Exception as error:
        what = str(error) if type(error) is BadArgument else f"{type(error).__name__}: {error}{_place(error)}"
        raise BadArgument(f"objective.function {config.function!r} cannot be used: {what}") from None


def _try(objective: Objective) -> None:
    signal = objective.advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    _check("advantages", signal, 2, "rollout")
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    tokens = Tokens(cu_seqlens, signal.float().repeat_interleave(cu_seqlens.diff()))
    log_prob, entropy = torch.tensor([[-0.1, -2.0, -0.7, -1.0, -0.2], [0.3, 2.5, 1.1, 0.9, 0.4]])
    student = {"student_log_prob": log_prob, "student_entropy": entropy}
    if objective.needs_teacher:
        tokens = replace(tokens, teacher_log_prob=log_prob.flip(0), teacher_entropy=entropy.flip(0))
    prepared = objective.prepare(replace(tokens, **student) if objective.needs_student else tokens, vocab_size=1000)
    tokens = replace(tokens, **student, fields=prepared)
    for name, values in prepared.items():
        _check(f"prepare's {name!r}", values, 5, "token")
    _check("weight", objective.weight(tokens), 5, "token")
    for name, values in objective.metrics(tokens).items():
        _check(f"metrics' {name!r}", values, 5, "token")
        if "/" not in name:
            raise BadArgument(f'a metric is called {name!r}; names look like "gate/mean"')


def _check(name: str, values: object, count: int, unit: str) -> None:
    if not isinstance(values, torch.Tensor) or values.shape != (count,):
        what = f"a tensor {list(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise BadArgument(f"{name} should be one number a {unit}, a tensor [{count}] here, and is {what}")
    if not values.isfinite().all():
        raise BadArgument(f"{name} is not finite: {values.tolist()}")


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(frame.filename).name}, line {frame.lineno})"
