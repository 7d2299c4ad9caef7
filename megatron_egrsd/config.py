"""The whole configuration: one tree of frozen dataclasses (config_reader.py fills it from YAML and the command line).

Everything that can be checked without a GPU, a model or a dataset is checked here, when a dataclass is made.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_egrsd.errors import BadArgument


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BadArgument(message)


@dataclass(frozen=True)
class ModelConfig:
    """The student, which is also its own teacher.

    Args:
        path: Directory of a Hugging Face Qwen3 checkpoint (config.json, tokenizer, safetensors).
        dtype: Type of the weights and activations in training and in SGLang.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        _require(bool(self.path), "model.path is not set; give the directory of a Hugging Face Qwen3 checkpoint")


@dataclass(frozen=True)
class DataConfig:
    """Problems and prompts.

    Args:
        train: Training problems: a .jsonl or .parquet file, or a Hugging Face dataset name ("name:split").
        evaluation: Held-out problems in the same format; empty switches evaluation off.
        problem_key: Field that holds the problem text.
        answer_key: Field that holds the verifiable answer.
        solution_key: Field that holds the reference solution, the privileged context.
        teacher_template: What the teacher reads as the user's turn; may use {problem}, {solution} and {answer}.
        system_prompt: Optional system turn, for student and teacher alike.
        enable_thinking: Passed to the chat template (Qwen3's thinking mode).
        max_prompt_tokens: A longer student or teacher prompt is refused, naming the problem.
        reward: "math" or the import path of a function (response: str, answer: str) -> float in [0, 1].
        reward_timeout: Seconds that one call of a reward function of the user's may take.
        bad_rows: Refuse a file with rows that cannot be trained on (not JSON, not UTF-8, empty, without an answer,
            over-long, duplicate), or leave those rows out and say how many and where.
    """

    train: str = ""
    evaluation: str = ""
    problem_key: str = "problem"
    answer_key: str = "answer"
    solution_key: str = "solution"
    teacher_template: str = (
        "{problem}\n\nHere is a reference solution to this problem:\n{solution}\n\n"
        "With this solution in mind, solve the problem in your own words."
    )
    system_prompt: str = ""
    enable_thinking: bool = True
    max_prompt_tokens: int = 2048
    reward: str = "math"
    reward_timeout: float = 30.0
    bad_rows: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self):
        fields = set(re.findall(r"{(\w*)}", self.teacher_template))
        unknown = fields - {"problem", "solution", "answer"}
        _require(
            not unknown,
            f"data.teacher_template uses {{{'}, {'.join(sorted(unknown))}}}; "
            "it knows {problem}, {solution} and {answer}",
        )
        _require(
            bool(fields & {"solution", "answer"}),
            "data.teacher_template must contain {solution} or {answer}: the teacher needs privileged context",
        )
        _require(self.max_prompt_tokens > 0, "data.max_prompt_tokens must be positive")
        _require(self.reward_timeout > 0, "data.reward_timeout must be positive")


@dataclass(frozen=True)
class ObjectiveConfig:
    """GRPO, RLSD, EGRSD and CL-EGRSD: one family (docs/reference/method.md). Symbols of the papers in brackets.

    Args:
        preset: A member of the family by its name (objectives/presets.py). It sets the keys that make it one; any key
            that is given beside it overrides it.
        mix: Share of the likelihood ratio in the magnitude, in [0, 1] (lam; RLSD).
        ratio_clip: The ratio is clipped to [1 - ratio_clip, 1 + ratio_clip] (eps_w; RLSD).
        attenuation: How far the teacher's entropy may close the gate, in [0, 1) (alpha; EGRSD).
        lookahead: Tokens the gate looks ahead for a resolved entropy; 0 is EGRSD (K; CL-EGRSD).
        entropy_normalization: Scale of the entropy: batch quantile, sequence maximum or ln(vocabulary) (ours).
        entropy_quantile: The quantile p of "quantile" (ours).
        entropy_quantile_floor: Lower bound of the quantile, in nats (ours).
        advantage: Within-group standardised reward, or +1 / -1 by outcome.
        advantage_std: Divide the group advantage by the group's standard deviation.
        clip_low: PPO clip below 1 of the policy ratio.
        clip_high: PPO clip above 1 of the policy ratio.
        importance_cap: Cap C of the truncated importance weight pi_old / pi_rollout; null switches it off.
        kl_coef: Weight of the KL divergence to the initial weights in the loss (beta of GRPO); 0 switches it off, and
            saves a pass a step and a copy of the weights.
        loss_normalization: Mean over the tokens of the global batch, mean of sequence means, or fixed length.
        fixed_length: Tokens per rollout that "fixed" divides by.
        function: Import path of an objective of your own, "file.py:Class" or "module:Class"
            (docs/guides/extending.md); empty is the family.
        options: Its options by name.
    """

    preset: str = ""
    mix: float = 0.5
    ratio_clip: float = 0.2
    attenuation: float = 0.9
    lookahead: int = 2
    entropy_normalization: Literal["quantile", "max", "log_vocab"] = "quantile"
    entropy_quantile: float = 0.95
    entropy_quantile_floor: float = 0.5
    advantage: Literal["group", "outcome"] = "group"
    advantage_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float | None = None
    kl_coef: float = 0.0
    loss_normalization: Literal["token_mean", "seq_mean", "fixed"] = "token_mean"
    fixed_length: int = 0
    function: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _require(0 <= self.mix <= 1, f"objective.mix is {self.mix}; it must lie in [0, 1]")
        _require(0 <= self.ratio_clip <= 1, f"objective.ratio_clip is {self.ratio_clip}; it must lie in [0, 1]")
        _require(
            0 <= self.attenuation < 1,
            f"objective.attenuation is {self.attenuation}; it must lie in [0, 1), "
            "so that every token keeps a positive weight",
        )
        _require(self.lookahead >= 0, f"objective.lookahead is {self.lookahead}; it must not be negative")
        _require(0 < self.entropy_quantile <= 1, "objective.entropy_quantile must lie in (0, 1]")
        _require(self.entropy_quantile_floor >= 0, "objective.entropy_quantile_floor must not be negative")
        _require(0 <= self.clip_low < 1, "objective.clip_low must lie in [0, 1)")
        _require(self.clip_high >= 0, "objective.clip_high must not be negative")
        _require(self.importance_cap is None or self.importance_cap > 0, "objective.importance_cap must be positive")
        _require(self.kl_coef >= 0, f"objective.kl_coef is {self.kl_coef}; it must not be negative")
        _require(
            self.loss_normalization != "fixed" or self.fixed_length > 0,
            'objective.loss_normalization is "fixed", so objective.fixed_length must be positive',
        )
        _require(not self.options or bool(self.function), "objective.options are those of objective.function; set it")


@dataclass(frozen=True)
class TeacherConfig:
    """Whose weights the teacher scores with.

    Args:
        weights: The student's current weights, its initial weights, or their exponential moving average.
        ema_decay: Decay per step of "ema".
    """

    weights: Literal["live", "frozen", "ema"] = "live"
    ema_decay: float = 0.99

    def __post_init__(self):
        _require(0 <= self.ema_decay < 1, "teacher.ema_decay must lie in [0, 1)")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling, and the SGLang servers that do it.

    Args:
        prompts_per_step: Prompts in one batch.
        rollouts_per_prompt: Responses sampled for each prompt: the group of the advantage.
        temperature: Sampling temperature; student and teacher are scored at the same one.
        max_response_tokens: A response is cut here and then counts as unfinished.
        urls: Servers that already run, or a router (sglang-router) for those behind it; empty launches `engines`
            servers on every node.
        engines: Servers to launch on each node.
        engine_tensor_parallel: Tensor-parallel size of each launched server.
        colocated: The launched servers run on the GPUs of the training ranks, and the two take turns: what one needs
            the other has moved to host memory, or freed, meanwhile. With weight_sync ipc or disk
            (docs/guides/cluster.md).
        host: Address the launched servers listen on; on other nodes than the first one, theirs towards it.
        port: First port of the launched servers; 0 picks free ones.
        cpu_threads: Threads of a launched server on CPU, whatever OMP_NUM_THREADS gives the training ranks. More than
            there are idle cores make it many times slower.
        max_concurrent_requests: Requests in flight for each server; what its memory does not hold waits there.
        max_total_tokens: Size of a launched server's KV cache in tokens; 0 leaves it to SGLang.
        weight_sync: Over a process group from the first training rank; by handles to memory of a node's first rank,
            which the servers of the same node open (CUDA IPC, shared memory on CPU); or through a directory on disk.
        sync_bucket_mib: Size of one broadcast bucket.
        verify_sync: Compare every weight in SGLang with the engine's after each synchronisation, bit by bit.
        start_timeout: Seconds until a launched server must be healthy.
        health_timeout: A server that has not been healthy for so many seconds while it generates counts as hung.
        max_restarts: How often servers may die or hang, and are started again, in one run; all that a failed weight
            synchronisation leaves half done count once.
        request_timeout: Seconds a generation request may take.
        request_retries: Further attempts after a request that failed on a healthy server.
        sync_timeout: Seconds one weight synchronisation may take.
        server_args: Further SGLang launch arguments, without the leading dashes; true means a bare flag.
        api_key_variable: Environment variable that holds the servers' API key; it is never written anywhere.
        dynamic_sampling: Rounds in which groups without a signal (all right or all wrong) are replaced by fresh
            prompts before a batch is trained; 0 trains the batch as it came.
        staleness: Updates that may lie between the weights that sample a token and those that it trains. 0 is exactly
            on-policy; 1 samples the next batch while this one trains (docs/guides/overlap.md); more needs
            `partial`.
        partial: Partial rollouts: new weights do not wait for the responses in flight, which go on with them.
        extra_prompts: Prompts in flight beyond one batch: as many may be carried over while others are trained. At most
            `prompts_per_step`, and only where `partial` is set and `staleness` is 2 or more.
    """

    prompts_per_step: int = 32
    rollouts_per_prompt: int = 8
    temperature: float = 1.0
    max_response_tokens: int = 8192
    urls: list[str] = field(default_factory=list)
    engines: int = 1
    engine_tensor_parallel: int = 1
    colocated: bool = False
    host: str = "127.0.0.1"
    port: int = 0
    cpu_threads: int = 1
    max_concurrent_requests: int = 512
    max_total_tokens: int = 0
    weight_sync: Literal["distributed", "ipc", "disk"] = "distributed"
    sync_bucket_mib: int = 512
    verify_sync: bool = False
    start_timeout: float = 600.0
    health_timeout: float = 120.0
    max_restarts: int = 10
    request_timeout: float = 3600.0
    request_retries: int = 3
    sync_timeout: float = 600.0
    server_args: dict[str, Any] = field(default_factory=dict)
    api_key_variable: str = ""
    dynamic_sampling: int = 0
    staleness: int = 0
    partial: bool = False
    extra_prompts: int = 0

    def __post_init__(self):
        for name in (
            "prompts_per_step",
            "max_response_tokens",
            "engines",
            "engine_tensor_parallel",
            "cpu_threads",
            "max_concurrent_requests",
            "sync_bucket_mib",
            "start_timeout",
            "health_timeout",
            "request_timeout",
            "sync_timeout",
        ):
            _require(getattr(self, name) > 0, f"rollout.{name} is {getattr(self, name)}; it must be positive")
        for name in ("max_restarts", "request_retries", "dynamic_sampling"):
            _require(getattr(self, name) >= 0, f"rollout.{name} must not be negative")
        _require(
            self.rollouts_per_prompt > 1,
            "rollout.rollouts_per_prompt must be at least 2: the advantage compares the rollouts of one prompt",
        )
        _require(self.temperature > 0, "rollout.temperature must be positive: on-policy sampling needs T > 0")
        _require(
            self.staleness in (0, 1) or (self.partial and self.staleness > 1),
            f"rollout.staleness is {self.staleness}; it must be 0 (on-policy) or 1 (the next batch is sampled while "
            "this one trains), or more with rollout.partial",
        )
        _require(
            not self.partial or self.staleness > 0,
            "rollout.partial continues responses with newer weights, but rollout.staleness is 0 and allows no older "
            "ones; set rollout.staleness to 1 or more",
        )
        _require(
            not (self.partial and self.dynamic_sampling),
            "rollout.partial and rollout.dynamic_sampling do not go together; set one of them",
        )
        _require(
            not (self.partial and any("speculative" in name for name in self.server_args)),
            "rollout.partial stops a response before SGLang has looked for its end among the tokens of its last step; "
            "with speculative decoding those are many, so take it out of rollout.server_args",
        )
        most = self.prompts_per_step if self.partial and self.staleness > 1 else 0
        _require(
            0 <= self.extra_prompts <= most,
            f"rollout.extra_prompts is {self.extra_prompts}; it must lie between 0 and rollout.prompts_per_step, and "
            "be 0 without rollout.partial and a rollout.staleness of 2 or more, so that what is carried over fits into "
            "one batch before it is too old",
        )
        if self.colocated:
            _require(
                not self.urls, "rollout.colocated shares GPUs with servers that the run launches; empty rollout.urls"
            )
            _require(
                self.weight_sync != "distributed",
                'rollout.colocated needs rollout.weight_sync "ipc" or "disk": NCCL takes no two processes on one GPU',
            )
            _require(
                not self.staleness,
                "rollout.colocated takes turns on one set of GPUs, rollout.staleness samples while they train; choose "
                "one of the two",
            )
        _require(0 <= self.port < 65536, f"rollout.port is {self.port}; it must lie in [0, 65535]")

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.rollouts_per_prompt


@dataclass(frozen=True)
class ParallelConfig:
    """How the training ranks split the model and the batch.

    Args:
        tensor: Tensor-parallel size (TP).
        pipeline: Pipeline-parallel size (PP).
        virtual_pipeline: Chunks of layers that a stage holds (VPP). With more than one, stages take turns more often
            and wait less, for more communication and activations (interleaved 1F1B, Narayanan et al. 2021).
        context: Context-parallel size (CP): as many ranks share each sequence of a micro-batch, for long responses.
        expert: Expert-parallel size (EP): as many ranks of a stage share the experts of a mixture; TP splits none.
        sequence_parallel: Split the activations outside attention and MLP over the TP ranks (SP).
        distributed_optimizer: Shard the optimizer state over the data-parallel and context-parallel ranks.
        max_tokens_per_microbatch: Token budget of one packed micro-batch on each context-parallel rank; a longer single
            sample gets its own.
        transformer_engine: Use Transformer Engine layers: always, never, or in bfloat16 where installed on a GPU. It
            has no fused attention for fp32: all attention probabilities would be kept.
        recompute: Recompute the activations of every layer in the backward pass.
        overlap_grad_reduce: Reduce gradients over the data-parallel ranks while the last backward pass still runs.
        megatron: Further fields of megatron-core's TransformerConfig that change how, not what it computes: fp8*,
            recompute_*, cpu_offloading*, *_fusion. The plan does not count them.
        timeout: Seconds a collective may take.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    max_tokens_per_microbatch: int = 16384
    transformer_engine: Literal["auto", "always", "never"] = "auto"
    recompute: bool = False
    overlap_grad_reduce: bool = False
    megatron: dict[str, Any] = field(default_factory=dict)
    timeout: float = 1800.0

    def __post_init__(self):
        sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
        for name in (*sizes, "max_tokens_per_microbatch", "timeout"):
            _require(getattr(self, name) > 0, f"parallel.{name} is {getattr(self, name)}; it must be positive")
        _require(
            not self.sequence_parallel or self.tensor > 1,
            "parallel.sequence_parallel needs parallel.tensor > 1; set one of them",
        )
        _require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            "parallel.virtual_pipeline divides the stages of a pipeline, but parallel.pipeline is 1; set one of them",
        )

    def wants_transformer_engine(self, dtype: str) -> bool:
        """Whether to use Transformer Engine for a model of this type where it can be had."""
        return self.transformer_engine == "always" or (self.transformer_engine == "auto" and dtype != "float32")

    @property
    def model_parallel(self) -> int:
        """Ranks of one replica: they work on the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def sequence_multiple(self) -> int:
        """What a sequence's length is padded to a multiple of: each CP rank holds two chunks of it (data/zigzag.py)."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def token_multiple(self) -> int:
        """What a micro-batch's tokens are padded to a multiple of, those of all context-parallel ranks together.

        Sequence parallelism splits them over TP; FP8 products want 16 rows on every rank, in the MXFP8 recipe 32.
        """
        share = self.tensor if self.sequence_parallel else 1
        return self.sequence_multiple * share * (32 if self.megatron.get("fp8") else 1)

    def tokens_on_a_rank(self, length: int) -> int:
        """What a context-parallel rank holds of a sequence of `length` tokens, padding included."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple // self.context

    @property
    def layer_chunks(self) -> int:
        """Parts of equal size that the layers are divided into: the chunks of all stages."""
        return self.pipeline * self.virtual_pipeline

    @property
    def interleaved(self) -> int | None:
        """`virtual_pipeline` as megatron-core takes it: None for the plain 1F1B schedule, which has no chunks."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None

    @property
    def round_of_micro_batches(self) -> int:
        """What their number is a multiple of: the interleaved schedule fills whole rounds."""
        return self.pipeline if self.interleaved else 1


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Args:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of a decaying schedule.
        schedule: Shape after the warm-up.
        warmup_steps: Linear warm-up, in optimizer steps.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay; norms and biases are exempt.
        clip_grad: Global gradient norm is clipped to this; 0 switches clipping off.
        updates_per_batch: Optimizer steps per rollout batch, each on an equal share of the prompts.
    """

    lr: float = 1e-6
    min_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    updates_per_batch: int = 1

    def __post_init__(self):
        _require(self.lr > 0, f"optimizer.lr is {self.lr}; it must be positive")
        _require(0 <= self.min_lr <= self.lr, "optimizer.min_lr must lie in [0, optimizer.lr]")
        _require(self.updates_per_batch > 0, "optimizer.updates_per_batch must be positive")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation: avg@k at `temperature`, during training and by `megatron-egrsd evaluate`.

    Args:
        every: Steps between evaluations; the end is always evaluated. 0: only the end and, with `at_start`, the start.
        at_start: Evaluate before the first step, too.
        rollouts_per_problem: k of avg@k.
        temperature: Sampling temperature.
        top_p: Sample from the smallest set of tokens of this probability. This key and those below are for `evaluate`.
        top_k: Sample from the k most likely tokens; 0 from all.
        sets: What to evaluate on: names of benchmarks, files, or NAME=FILE (docs/guides/evaluation.md).
        directory: Where the files of benchmarks are: aime24.jsonl, gsm8k.parquet, ...
        hub: Download a benchmark that is not in `directory` from the Hugging Face hub.
        instruction: Text below every problem, such as "Please reason step by step, and put your final answer within
            \\boxed{}."
        deterministic: A seed for every sample, and SGLang's deterministic inference: an evaluation repeats itself,
            interrupted or not. Slower on a GPU.
        like: Hugging Face directory with config.json and tokenizer, where model.path is a Megatron checkpoint without.
    """

    every: int = 0
    at_start: bool = True
    rollouts_per_problem: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    sets: list[str] = field(default_factory=list)
    directory: str = ""
    hub: bool = False
    instruction: str = ""
    deterministic: bool = True
    like: str = ""

    def __post_init__(self):
        _require(self.every >= 0, "evaluation.every must not be negative")
        _require(self.rollouts_per_problem > 0, "evaluation.rollouts_per_problem must be positive")
        _require(self.temperature >= 0, "evaluation.temperature must not be negative")
        _require(0 < self.top_p <= 1, f"evaluation.top_p is {self.top_p}; it must lie in (0, 1]")
        _require(self.top_k >= 0, "evaluation.top_k must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    """Training checkpoints under output/checkpoints; any parallel layout can continue from them.

    Args:
        every: Steps between checkpoints, the last step included; 0 writes one only when the run is stopped.
        keep: Newest checkpoints that are kept, besides the one with the best evaluation.
        resume: "auto" continues from the newest intact checkpoint in output, from the start where there is none; a
            directory continues from that checkpoint; empty starts a new run. `--resume` is short for it.
    """

    every: int = 0
    keep: int = 2
    resume: str = ""

    def __post_init__(self):
        _require(self.every >= 0, "checkpoint.every must not be negative")
        _require(self.keep > 0, "checkpoint.keep must be positive")


@dataclass(frozen=True)
class Config:
    """A training run.

    Args:
        model: The student.
        data: Problems and prompts.
        objective: Token weights and loss.
        teacher: Whose weights the teacher scores with.
        rollout: Sampling and SGLang.
        parallel: How the training ranks split model and batch.
        optimizer: AdamW.
        evaluation: Held-out evaluation.
        checkpoint: Saving and resuming.
        steps: Rollout batches to train on.
        seed: Seed of the data order, of sampling and of the initial state of every random generator.
        output: Directory of the run: metrics, logs, final Hugging Face checkpoint. Must not hold another run.
        max_log_prob_difference: Largest mean |log-prob(engine) - log-prob(SGLang)| over a batch, in nats; beyond it the
            two disagree and the update is skipped. null is 0.1, and 0.1 more for every update that rollout.staleness
            lets lie between the two.
        max_skipped_steps: Steps in a row that may be skipped (numbers that are not finite, or the disagreement above)
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
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
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
        _require(self.steps > 0, f"steps is {self.steps}; it must be positive")
        _require(self.max_skipped_steps >= 0, "max_skipped_steps must not be negative")
        _require(
            bool(self.replay) == (self.debug == "train-only"),
            "replay and debug train-only go together: the one names the rollouts that the other trains on",
        )
        _require(bool(self.data.train), "data.train is not set; give a .jsonl or .parquet file of problems")
        _require(
            self.rollout.prompts_per_step % self.optimizer.updates_per_batch == 0,
            f"rollout.prompts_per_step = {self.rollout.prompts_per_step} does not divide into "
            f"optimizer.updates_per_batch = {self.optimizer.updates_per_batch} equal shares",
        )
        _require(
            not self.rollout.staleness or self.objective.importance_cap is not None,
            "rollout.staleness trains on samples of older weights and needs the truncated importance weight that "
            "corrects for it; set objective.importance_cap, for example to 2",
        )

    @property
    def log_prob_limit(self) -> float:
        """`max_log_prob_difference` in nats, or its default."""
        if self.max_log_prob_difference is not None:
            return self.max_log_prob_difference
        return 0.1 * (1 + self.rollout.staleness)

    def check_world(self, world_size: int) -> int:
        """The data-parallel size for `world_size` ranks; BadArgument where the sizes do not divide."""
        model_parallel = self.parallel.model_parallel
        _require(
            world_size % model_parallel == 0,
            f"{world_size} training ranks do not divide into replicas of parallel.tensor x parallel.pipeline x "
            f"parallel.context = {self.parallel.tensor} x {self.parallel.pipeline} x {self.parallel.context} = "
            f"{model_parallel} ranks; "
            f"start a multiple of {model_parallel} with torchrun --nproc-per-node",
        )
        data_parallel = world_size // model_parallel
        stage = world_size // self.parallel.pipeline
        _require(
            stage % self.parallel.expert == 0,
            f"parallel.expert = {self.parallel.expert} does not divide the {stage} ranks of a pipeline stage",
        )
        rollouts = self.rollout.rollouts_per_step // self.optimizer.updates_per_batch
        _require(
            rollouts % data_parallel == 0,
            f"one update trains {rollouts} rollouts (prompts x rollouts per prompt / updates per batch), which "
            f"do not divide over {data_parallel} data-parallel ranks",
        )
        return data_parallel
