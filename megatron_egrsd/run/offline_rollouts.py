"""Batches without SGLang: the dumps of another run (`debug: train-only`), or the reference solutions."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_egrsd.config import Config
from megatron_egrsd.data.dump_files import dump_path
from megatron_egrsd.data.problems import Place, problem_indices
from megatron_egrsd.data.prompt_builder import prompt_builder
from megatron_egrsd.data.samples import Prompt, Rollout, load_rollouts
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.fleet.colocation import Placement, Separate
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.objectives.load import load_objective, needs_teacher
from megatron_egrsd.run.stopwatch import Stopwatch
from megatron_egrsd.sampling.batches import Batch

GetBatch = Callable[[list[Prompt], int], Batch]  # as RolloutSource.batch


class OfflineRollouts:
    """The RolloutSource of `batch`, a function as its own: nothing can be evaluated, and no server takes weights."""

    def __init__(self, batch: GetBatch):
        self.batch = batch
        self.placement: Placement = Separate(None)
        self.restarts = 0

    def evaluation(self, prompts: list[Prompt], step: int) -> list[Rollout]:
        return []

    def push_weights(self, version: int, watch: Stopwatch) -> None:
        watch.seconds["time/sync"] = 0.0


def solution_batches(config: Config, engine: Engine, begin: Place) -> GetBatch:
    """Return batches of reference solutions, in the order of the problems from `begin` on."""
    solutions, size = Solutions(prompt_builder(config), config), config.rollout.prompts_per_step
    if engine.is_first_rank:
        left_out = "; held-out problems are not evaluated" if config.data.evaluation else ""
        print(f"rollouts: none, the reference solutions are trained, without SGLang{left_out}", flush=True)

    def batch(prompts: list[Prompt], step: int) -> Batch:
        chosen = problem_indices(len(prompts), begin.after(step, size), size, config.seed)
        return Batch([solutions.rollout(prompts[i], group, step) for group, i in enumerate(chosen)], 0)

    return batch


def replayed_batches(config: Config, engine: Engine, begin: Place) -> GetBatch:
    """Return the batches of `config.replay`: one file for every step, or a directory with a file for each.

    Raises BadArgument if a step from `begin` on has no file.
    """
    on_first_rank(lambda: check_replay(config, begin.step))
    if engine.is_first_rank:
        print(f"rollouts: replayed from {config.replay}, without SGLang", flush=True)

    def batch(prompts: list[Prompt], step: int) -> Batch:
        rollouts = on_first_rank(lambda: load_replay(_dump(config, step), config, engine.arch))
        return Batch(rollouts, len(rollouts))

    return batch


def _dump(config: Config, step: int) -> Path:
    """Return the file of `step` (from 0)."""
    path = Path(config.replay)
    return dump_path(path, step + 1) if path.is_dir() else path


def check_replay(config: Config, begin: int) -> None:
    """Raise BadArgument unless every step from `begin` (from 0) on has a file."""
    for step in range(begin, config.steps):
        if not (path := _dump(config, step)).is_file():
            raise BadArgument(
                f"replay = {config.replay} has no {path.name}, but the run has {config.steps} steps; lower steps"
            )


def load_replay(path: Path, config: Config, arch: Architecture) -> list[Rollout]:
    """Load rollouts that a model of `arch` can train on as one batch.

    Raises BadArgument if they do not fit the batch, the vocabulary, the objective or, to be replayed, the experts.
    """
    rollouts = load_rollouts(path)
    prompts, n = config.rollout.prompts_per_step, config.rollout.rollouts_per_prompt
    groups = Counter(r.group for r in rollouts)
    if groups != Counter({group: n for group in range(prompts)}):
        raise BadArgument(
            f"{path} holds {len(rollouts)} rollouts in {len(groups)} groups, but rollout.prompts_per_step x "
            f"rollout.rollouts_per_prompt = {prompts} x {n} are needed, in groups 0 to {prompts - 1}"
        )
    privileged = needs_teacher(config.objective)
    siblings, several = privileged and config.data.reads_siblings, load_objective(config.objective).needs_contexts
    if not siblings:  # of a run whose teacher read rollouts
        rollouts = [replace(r, contexts=None) for r in rollouts]
    for number, r in enumerate(rollouts, 1):
        ids = itertools.chain(r.prompt.student_ids, r.prompt.teacher_ids, r.response_ids, *(r.contexts or []))
        if max(ids) >= arch.vocab_size:
            raise BadArgument(f"{path}, line {number}: a token beyond the model's vocabulary of {arch.vocab_size}")
        if siblings and (r.contexts is None or (several and len(r.contexts) == 1)):
            raise BadArgument(f"{path}, line {number}: no contexts as data.teacher_context makes them")
        if config.rollout.routing_replay and not _routes_fit(r, arch):
            raise BadArgument(f"{path}, line {number}: no routes of this model, which rollout.routing_replay needs")
        if privileged and not siblings and not r.prompt.teacher_ids:
            raise BadArgument(f"{path}, line {number}: no teacher prompt, which this objective needs")
    return rollouts


def _routes_fit(rollout: Rollout, arch: Architecture) -> bool:
    """Return whether the rollout's routes are experts of `arch`, in each layer, of all tokens but the last."""
    whole = len(rollout.routes) == rollout.routed_tokens * arch.num_layers * arch.experts_per_token
    return whole and max(rollout.routes) < arch.num_experts
