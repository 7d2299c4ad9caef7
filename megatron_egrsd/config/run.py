"""The whole configuration of a run."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_egrsd.config.check import require, require_finite, require_not_negative, require_positive
from megatron_egrsd.config.evaluation import EvaluationConfig
from megatron_egrsd.config.logging import LoggingConfig
from megatron_egrsd.config.lora import LoraConfig
from megatron_egrsd.config.model import DataConfig, ModelConfig
from megatron_egrsd.config.objective import ObjectiveConfig, TeacherConfig
from megatron_egrsd.config.optimizer import OptimizerConfig
from megatron_egrsd.config.parallel import ParallelConfig
from megatron_egrsd.config.rollout import RolloutConfig


@dataclass(frozen=True)
class CheckpointConfig:
    """Training checkpoints under output/checkpoints; any parallel layout can continue from them.

    Args:
        every: Steps between checkpoints, the last step included; 0 writes one only when the run is stopped.
        asynchronous: Train on while a checkpoint is written, from a copy in host memory. It gets its name between two
            later steps. The next checkpoint, and the end of the run, wait for it.
        keep: Newest checkpoints that are kept, besides the one with the best evaluation.
        resume: "auto" continues from the newest intact checkpoint in output, from the start if there is none; a
            directory continues from that checkpoint; empty starts a new run. `--resume` is short for it.
    """

    every: int = 0
    asynchronous: bool = False
    keep: int = 2
    resume: str = ""

    def __post_init__(self):
        require_not_negative(self, "checkpoint", "every")
        require_positive(self, "checkpoint", "keep")


@dataclass(frozen=True)
class Config:
    """A training run.

    Args:
        model: The student.
        data: Problems and prompts.
        objective: Token weights and loss.
        teacher: Whose weights the teacher scores with.
        lora: Adapters that are trained in place of the weights.
        rollout: Sampling and SGLang.
        parallel: The division of model and batch over the training ranks.
        optimizer: AdamW.
        evaluation: Held-out evaluation.
        checkpoint: Saving and resuming.
        logging: Further places for the metrics.
        steps: Rollout batches to train on.
        seed: Seed of the data order, of sampling and of the initial state of every random generator.
        output: Directory of the run: metrics, logs, final Hugging Face checkpoint. Must not hold another run.
        max_log_prob_difference: Largest mean |log-prob(engine) - log-prob(SGLang)| over a batch, in nats; beyond it the
            two disagree and the update is skipped. null is 0.1, and 0.1 more for every update that rollout.staleness
            lets lie between the two.
        max_skipped_steps: Steps in a row that may skip an update (numbers not finite, or the disagreement above)
            before the run ends; the rollouts of each are kept under output/skipped.
        debug: "rollout-only" samples and rewards with the weights of model.path, without a training engine;
            "train-only" trains on `replay`, without SGLang.
        replay: Rollouts for "train-only", as dump_rollouts writes them: one file for every step, or a directory of
            step_NNNNNN.jsonl.
        dump_rollouts: Write every step's rollouts under output/rollouts.
        dump_scores: Write what the objective saw and decided at every token under output/scores, for the token page
            (docs/guides/report.md). Costs one more student pass a step and about 130 bytes a response token.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    steps: int = 100
    seed: int = 0
    output: str = "runs/egrsd"
    max_log_prob_difference: float | None = None
    max_skipped_steps: int = 3
    debug: Literal["", "rollout-only", "train-only"] = ""
    replay: str = ""
    dump_rollouts: bool = False
    dump_scores: bool = False

    def __post_init__(self):
        require_finite(self, "")
        require(0 <= self.seed < 2**31, f"seed is {self.seed}; it must lie in [0, 2^31)")
        require(self.max_log_prob_difference is None or self.max_log_prob_difference > 0,
                f"max_log_prob_difference is {self.max_log_prob_difference}; it must be positive")  # fmt: skip
        require(self.steps > 0, f"steps is {self.steps}; it must be positive")
        require(self.max_skipped_steps >= 0, "max_skipped_steps must not be negative")
        require(
            bool(self.replay) == (self.debug == "train-only"),
            "replay and debug train-only go together: the one names the rollouts that the other trains on",
        )
        require(bool(self.data.train), "data.train is not set; give a .jsonl or .parquet file of problems")
        require(
            self.rollout.prompts_per_step % self.optimizer.updates_per_batch == 0,
            f"rollout.prompts_per_step = {self.rollout.prompts_per_step} does not divide into "
            f"optimizer.updates_per_batch = {self.optimizer.updates_per_batch} equal shares",
        )
        limit = self.rollout.servers.request_timeout
        require(
            self.debug == "train-only" or self.parallel.timeout > limit,
            f"parallel.timeout is {self.parallel.timeout:g} s; it must exceed rollout.servers.request_timeout = "
            f"{limit:g} s, because the other ranks wait in a collective while rank 0 samples",
        )
        self._check_lora()
        self._check_objective()

    def _check_lora(self) -> None:
        """Check what SGLang's own LoRA needs, if it gets the adapters."""
        sync, servers = self.rollout.sync, self.rollout.servers
        if not self.lora.enabled or sync.lora == "merged":
            return
        key = "rollout.sync.lora adapter"
        require(not servers.urls, f"{key} needs servers that the run launches; empty rollout.servers.urls")
        require(
            not servers.colocated,
            f"{key} needs servers that keep their weights, but rollout.servers.colocated makes them give up theirs "
            "while the ranks train; take merged",
        )
        require(
            sync.transport != "distributed",
            f'{key} needs rollout.sync.transport "ipc" or "disk": SGLang takes no adapters from a process group',
        )
        require(
            not (sync.verify and sync.transport == "disk"),
            f'{key} with rollout.sync.verify needs rollout.sync.transport "ipc": SGLang checks no adapters from disk',
        )

    def _check_objective(self) -> None:
        """Check the objective against the sampling."""
        objective, rollout = self.objective, self.rollout
        least = {"sibling": 2, "contrast": 3, "majority": 2}.get(self.data.teacher_context, 1)
        require(
            rollout.rollouts_per_prompt >= least,
            f'data.teacher_context "{self.data.teacher_context}" is made of several rollouts of the prompt, so '
            f"rollout.rollouts_per_prompt must be at least {least}, and is {rollout.rollouts_per_prompt}",
        )
        if not objective.function:
            require(
                objective.advantage != "group" or rollout.rollouts_per_prompt > 1,
                'objective.advantage "group" compares the rollouts of one prompt, but rollout.rollouts_per_prompt is 1;'
                ' set it to 2 or more, or the advantage to "running"',
            )
            require(
                objective.advantage != "running" or not rollout.dynamic_sampling,
                "rollout.dynamic_sampling replaces groups without a signal, but with objective.advantage "
                '"running" every rollout has one; set dynamic_sampling to 0, or the advantage to "group"',
            )
        if objective.importance_cap is None:
            require(
                not rollout.staleness,
                "rollout.staleness trains on samples of older weights and needs the truncated importance weight that "
                "corrects for it; set objective.importance_cap, for example to 2",
            )
            return
        require(
            rollout.top_p == 1 and not rollout.top_k,
            "objective.importance_cap needs the probabilities that responses were sampled with, but SGLang reports "
            "them as they are before rollout.top_p and rollout.top_k; set importance_cap to null, or top_p to 1 and "
            "top_k to 0",
        )
        require(
            self.score_temperature == rollout.temperature,
            "objective.importance_cap compares the engine's log-probs with SGLang's, but objective.score_temperature "
            f"is {self.score_temperature:g} and rollout.temperature {rollout.temperature:g}; set importance_cap to "
            "null, or one temperature for both",
        )

    @property
    def score_temperature(self) -> float:
        """The temperature at which student and teacher are scored."""
        return self.objective.score_temperature or self.rollout.temperature

    @property
    def log_prob_limit(self) -> float:
        """`max_log_prob_difference` in nats, or its default: none if scoring and sampling differ in temperature."""
        if self.max_log_prob_difference is not None:
            return self.max_log_prob_difference
        return 0.1 * (1 + self.rollout.staleness) if self.score_temperature == self.rollout.temperature else math.inf

    @property
    def rollouts_per_update(self) -> int:
        return self.rollout.rollouts_per_step // self.optimizer.updates_per_batch

    def check_world(self, world_size: int) -> int:
        """Return the data-parallel size for `world_size` ranks. Raises BadArgument if the sizes do not divide."""
        return self.parallel.check_world(world_size, self.rollouts_per_update)
