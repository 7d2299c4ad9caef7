"""The parallel layout of the training ranks."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_egrsd.config.check import require, require_positive


@dataclass(frozen=True)
class ParallelConfig:
    """The division of the model and the batch over the training ranks.

    Args:
        tensor: Tensor-parallel size (TP). With a multiple of the model's key/value heads, ranks share them.
        pipeline: Pipeline-parallel size (PP).
        virtual_pipeline: Chunks of layers that a stage holds (VPP). With more than one, stages take turns more often
            and wait less, for more communication and activations (interleaved 1F1B, Narayanan et al. 2021).
        pipeline_layout: Layers of every stage, from the first to the last, if they differ; with `virtual_pipeline` of
            every chunk in the order of the model (the first chunk of each stage, then the second). Empty: equal parts.
        context: Context-parallel size (CP): as many ranks share each sequence of a micro-batch, for long responses.
        expert: Expert-parallel size (EP): as many ranks of a stage share the experts of a mixture; TP splits none.
        sequence_parallel: Split the activations outside attention and MLP over the TP ranks (SP).
        distributed_optimizer: Shard the optimizer state over the data-parallel and context-parallel ranks.
        max_tokens_per_microbatch: Token budget of one packed micro-batch on each context-parallel rank; a longer single
            sample gets its own.
        transformer_engine: Use Transformer Engine layers: always, never, or in bfloat16 if installed on a GPU. It
            has no fused attention for fp32: all attention probabilities would be kept.
        recompute: Recompute the activations of every layer in the backward pass.
        overlap_grad_reduce: Reduce gradients over the data-parallel ranks while the last backward pass still runs.
        megatron: Further fields of megatron-core's TransformerConfig that change how, not what it computes: fp8*,
            recompute_*, cpu_offloading*, *_fusion, persist_layer_norm, deallocate_pipeline_outputs. The plan does not
            count them.
        timeout: Seconds a collective may take; more than rollout.servers.request_timeout, because the other ranks wait
            in a collective while rank 0 samples.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    pipeline_layout: list[int] = field(default_factory=list)
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    max_tokens_per_microbatch: int = 16384
    transformer_engine: Literal["auto", "always", "never"] = "auto"
    recompute: bool = False
    overlap_grad_reduce: bool = False
    megatron: dict[str, Any] = field(default_factory=dict)
    timeout: float = 7200.0

    def __post_init__(self):
        sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
        require_positive(self, "parallel", *sizes, "max_tokens_per_microbatch", "timeout")
        require(
            not self.sequence_parallel or self.tensor > 1,
            "parallel.sequence_parallel needs parallel.tensor > 1; set one of them",
        )
        require(
            not self.pipeline_layout
            or (len(self.pipeline_layout) == self.layer_chunks and min(self.pipeline_layout) > 0),
            f"parallel.pipeline_layout = {self.pipeline_layout} must hold a positive number of layers for each of "
            f"parallel.pipeline x parallel.virtual_pipeline = {self.layer_chunks} parts",
        )
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            "parallel.virtual_pipeline divides the stages of a pipeline, but parallel.pipeline is 1; set one of them",
        )

    def wants_transformer_engine(self, dtype: str) -> bool:
        """Return whether to use Transformer Engine, if it is there, for a model of this type."""
        return self.transformer_engine == "always" or (self.transformer_engine == "auto" and dtype != "float32")

    @property
    def model_parallel(self) -> int:
        """Ranks of one replica: they work on the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def sequence_multiple(self) -> int:
        """Pad each sequence to a multiple of this many tokens: a CP rank holds two chunks of it (data/zigzag.py)."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def token_multiple(self) -> int:
        """Pad each micro-batch, on all context-parallel ranks together, to a multiple of this many tokens.

        Sequence parallelism splits them over TP; FP8 products want 16 rows on every rank, in the MXFP8 recipe 32.
        """
        share = self.tensor if self.sequence_parallel else 1
        return self.sequence_multiple * share * (32 if self.megatron.get("fp8") else 1)

    def tokens_on_a_rank(self, length: int) -> int:
        """Return the tokens, padding included, that a context-parallel rank holds of a sequence of `length` tokens."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple // self.context

    @property
    def layer_chunks(self) -> int:
        """Parts that the layers are divided into: the chunks of all stages."""
        return self.pipeline * self.virtual_pipeline

    def layers_of_chunks(self, layers: int) -> list[int]:
        """Return how many of the model's `layers` each part holds, in the order of the model."""
        return self.pipeline_layout or [layers // self.layer_chunks] * self.layer_chunks

    def layers_of_stage(self, layers: int, stage: int) -> list[int]:
        """Return how many of the model's `layers` each chunk of a stage holds."""
        return self.layers_of_chunks(layers)[stage :: self.pipeline]

    @property
    def interleaved(self) -> int | None:
        """`virtual_pipeline` as megatron-core takes it: None for the plain 1F1B schedule, which has no chunks."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None

    @property
    def round_of_micro_batches(self) -> int:
        """Micro-batches come in multiples of this number: the interleaved schedule fills whole rounds."""
        return self.pipeline if self.interleaved else 1

    def check_world(self, world_size: int, rollouts_per_update: int) -> int:
        """Return the data-parallel size for `world_size` ranks. Raises BadArgument if the sizes do not divide."""
        require(
            world_size % self.model_parallel == 0,
            f"{world_size} training ranks do not divide into replicas of parallel.tensor x parallel.pipeline x "
            f"parallel.context = {self.tensor} x {self.pipeline} x {self.context} = "
            f"{self.model_parallel} ranks; "
            f"start a multiple of {self.model_parallel} with torchrun --nproc-per-node",
        )
        data_parallel = world_size // self.model_parallel
        stage = world_size // self.pipeline
        require(
            stage % self.expert == 0,
            f"parallel.expert = {self.expert} does not divide the {stage} ranks of a pipeline stage",
        )
        require(
            rollouts_per_update % data_parallel == 0,
            f"one update trains {rollouts_per_update} rollouts (prompts x rollouts per prompt / updates per batch), "
            f"which do not divide over {data_parallel} data-parallel ranks",
        )
        return data_parallel
