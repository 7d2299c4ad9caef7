"""Find the objective that a configuration names, and try a user's own before anything is started."""

import math
import traceback
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.egrsd import EGRSD
from megatron_egrsd.objectives.interface import Objective, Tokens
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.system import import_path
from megatron_egrsd.vocab_parallel import DivergenceForm

if TYPE_CHECKING:
    from megatron_egrsd.config import Config, ObjectiveConfig


def load_objective(config: "ObjectiveConfig", history: History | None = None) -> Objective:
    """Make the objective that `config.function` names with `config.options`, EGRSD if it names none.

    `history` is what earlier steps leave to it; default: nothing, as before the first step. Raises BadArgument if there
    is no such objective, or if it does not take these options.
    """
    history = history or History()
    if not config.function:
        return EGRSD(config, history=history)
    cls = import_path.load(config.function, "objective.function")
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise BadArgument(
            f"objective.function {config.function!r} is no subclass of megatron_egrsd.objectives.Objective"
        )
    options = [f.name for f in fields(cls) if f.name not in ("config", "history")]
    if unknown := [name for name in config.options if name not in options]:
        available = f"its options are {', '.join(options)}" if options else "it has no options"
        raise BadArgument(f"objective.options: {cls.__name__} has no option {unknown[0]!r}; {available}")
    try:
        objective = cls(config, **config.options, history=history)
    except Exception as error:
        raise BadArgument(f"objective.options of {cls.__name__}: {error}") from None
    if objective.needs_token_mean and config.loss_normalization != "token_mean":
        raise BadArgument(
            f'objective.loss_normalization is "{config.loss_normalization}", but the loss of {cls.__name__} is a mean '
            "over tokens of its own choice; set it to token_mean"
        )
    return objective


def needs_teacher(config: "ObjectiveConfig") -> bool:
    """Return whether the weights depend on the teacher; GRPO's do not. Raises BadArgument as `load_objective` does."""
    return load_objective(config).needs_teacher


def needs_rollouts(config: "ObjectiveConfig") -> bool:
    """Return whether responses are sampled, and not the reference solutions trained. Raises as `load_objective`."""
    return load_objective(config).needs_rollouts


def needs_teacher_prompts(config: "Config") -> bool:
    """Return whether every problem needs a prompt for the teacher; one that reads rollouts gets it after sampling."""
    return needs_teacher(config.objective) and not config.data.reads_siblings


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
    _check("without_context", objective.without_context(signal), 2, "rollout")
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    tokens = Tokens(cu_seqlens, signal.float().repeat_interleave(cu_seqlens.diff()))
    log_prob, entropy = torch.tensor([[-0.1, -2.0, -0.7, -1.0, -0.2], [0.3, 2.5, 1.1, 0.9, 0.4]])
    student = {"student_log_prob": log_prob, "student_entropy": entropy}
    if objective.divergence is not None:
        _check_divergence(objective)
        student["divergence"] = entropy.flip(0) / 10
    if objective.needs_teacher:
        tokens = replace(tokens, teacher_log_prob=log_prob.flip(0), teacher_entropy=entropy.flip(0))
    if objective.needs_contexts:  # two for the first rollout, one for the second
        if not objective.needs_teacher:
            raise BadArgument("needs_contexts is True, but the contexts are the teacher's, and needs_teacher is False")
        second = torch.where(torch.arange(5) < 3, log_prob / 2, torch.nan)
        tokens = replace(tokens, context_log_prob=torch.stack([2 * log_prob, second]))
    seen = replace(tokens, **student) if objective.needs_student else tokens
    prepared = objective.prepare(seen, vocab_size=1000, group=None)
    tokens = replace(tokens, **student, fields=prepared)
    for name, values in prepared.items():
        _check(f"prepare's {name!r}", values, 5, "token")
    _check("weight", objective.weight(tokens), 5, "token")
    _check("divergence_weight", objective.divergence_weight(tokens), 5, "token")
    for name, value in objective.remember(tokens, group=None).items():
        if not isinstance(value, float) or not math.isfinite(value):
            raise BadArgument(f"remember's {name!r} should be a finite float, and is {value!r}")
    for name, values in objective.metrics(tokens).items():
        _check(f"metrics' {name!r}", values, 5, "token")
        if "/" not in name:
            raise BadArgument(f'a metric is called {name!r}; names look like "gate/mean"')


def _check_divergence(objective: Objective) -> None:
    if not isinstance(objective.divergence, DivergenceForm):
        raise BadArgument(f"divergence should be a DivergenceForm, and is {objective.divergence!r}")
    if not objective.needs_teacher:
        raise BadArgument("divergence is one from the teacher, but needs_teacher is False")


def _check(name: str, values: object, count: int, unit: str) -> None:
    if not isinstance(values, torch.Tensor) or values.shape != (count,):
        what = f"a tensor {list(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise BadArgument(f"{name} should be one number a {unit}, a tensor [{count}] here, and is {what}")
    if not values.isfinite().all():
        raise BadArgument(f"{name} is not finite: {values.tolist()}")


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if frame.filename == __file__:  # a signature that does not take what the loop gives
        return ""
    return f" ({Path(frame.filename).name}, line {frame.lineno})"
