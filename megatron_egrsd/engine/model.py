"""The model as a megatron-core GPTModel, from the sizes in a Hugging Face config.json."""

import dataclasses
import difflib
import fnmatch
import importlib.util
import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.engine.layers import CausalAttention, RMSNorm
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.adapters import AdapterSpec
from megatron_egrsd.hf.architecture import Architecture

# Fields of TransformerConfig that change how a result is computed, not which: what parallel.megatron may hold.
_ALLOWED_FIELDS = "fp8*, recompute_*, cpu_offloading*, *_fusion, persist_layer_norm, deallocate_pipeline_outputs"
# Those that cannot work here, and why not.
_REFUSED_FIELDS = {
    "fp8_param": "stores the weights in FP8, which can be neither filled nor sent to SGLang; fp8 alone computes in it",
    "tp_comm_*": "sends through buffers of one length, but packed micro-batches have many",
}


def use_transformer_engine(parallel: ParallelConfig, dtype: torch.dtype) -> bool:
    """Return whether to build Transformer Engine layers; BadArgument if they are demanded but not there."""
    possible = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if parallel.transformer_engine == "always" and not possible:
        raise BadArgument(
            'parallel.transformer_engine is "always", but there is no CUDA device or transformer-engine is not '
            'installed; install it or choose "auto"'
        )
    return possible and parallel.wants_transformer_engine(str(dtype).removeprefix("torch."))


def transformer_config(arch: Architecture, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Return megatron-core's configuration of this model in this layout.

    Losses arrive at the schedule already divided by the global batch's normaliser, so the schedule must only sum:
    calculate_per_token_loss switches its divisions off. Raises BadArgument if parallel.megatron does not fit.
    """
    on_gpu = torch.cuda.is_available()
    fused = use_transformer_engine(parallel, dtype)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    settings = dict(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        qk_layernorm=arch.family.qk_norm,
        add_qkv_bias=arch.family.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleaved,
        context_parallel_size=parallel.context,
        # Batched, the interleaved schedule would mix up what two stages send each other both ways.
        overlap_p2p_comm=bool(parallel.interleaved),
        batch_p2p_comm=not parallel.interleaved,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, dense models included
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every weight is loaded from the checkpoint
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,  # SDPA or Transformer Engine does the softmax
        persist_layer_norm=fused,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=fused,
        batch_p2p_sync=on_gpu,
    )
    if arch.rope_scaling:
        # The factor of queries and of keys, which only an unfused rotary embedding could apply itself.
        settings["softmax_scale"] = arch.rope_scaling.attention_factor**2 / math.sqrt(arch.head_dim)
    if parallel.pipeline_layout:
        settings["pipeline_model_parallel_layout"] = _pipeline_layout(parallel)
    settings |= recompute if parallel.recompute else {}
    settings |= _experts(arch, parallel, fused) if arch.num_experts else {}
    check_megatron(parallel)
    try:
        return TransformerConfig(**settings | parallel.megatron)
    except (ValueError, AssertionError, TypeError, ImportError) as error:
        if not parallel.megatron:
            raise
        raise BadArgument(f"megatron-core refuses parallel.megatron: {' '.join(str(error).split())}") from None


def _pipeline_layout(parallel: ParallelConfig) -> list[list[str]]:
    """Return the content of every chunk, in megatron-core's words."""
    chunks = [["decoder"] * layers for layers in parallel.pipeline_layout]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def check_megatron(parallel: ParallelConfig) -> None:
    """Raise BadArgument if a key of parallel.megatron is no field of TransformerConfig, or changes the model."""
    fields = [field.name for field in dataclasses.fields(TransformerConfig)]
    for name in parallel.megatron:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadArgument(f"parallel.megatron.{name} is no field of megatron-core's TransformerConfig{hint}")
        for pattern, reason in _REFUSED_FIELDS.items():
            if fnmatch.fnmatch(name, pattern):
                raise BadArgument(f"parallel.megatron.{name} {reason}")
        if not any(fnmatch.fnmatch(name, pattern) for pattern in _ALLOWED_FIELDS.split(", ")):
            raise BadArgument(
                f"parallel.megatron.{name} is not among the fields that only change how the model is computed: "
                f"{_ALLOWED_FIELDS}"
            )


def _experts(arch: Architecture, parallel: ParallelConfig, fused: bool) -> dict:
    """Return settings of experts as Hugging Face routes: fp32 softmax over all experts, the best k, normalised or not.

    Normalising the chosen probabilities is the softmax over the chosen logits, which megatron-core calls post-softmax.
    """
    return {
        "num_moe_experts": arch.num_experts,
        "moe_ffn_hidden_size": arch.expert_intermediate_size,
        "moe_router_topk": arch.experts_per_token,
        "moe_router_pre_softmax": not arch.normalize_expert_weights,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": fused,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def build_model(
    arch: Architecture, config: TransformerConfig, parallel: ParallelConfig, adapter: AdapterSpec | None = None
) -> list[GPTModel]:
    """Build this rank's shard of its stage, with weights still undefined: parallel.virtual_pipeline chunks of layers.

    Every linear layer that can have an `adapter` is of a class whose input can be seen.
    """
    fused = use_transformer_engine(parallel, config.params_dtype)
    chunks = range(parallel.interleaved) if parallel.interleaved else [None]
    models = [
        GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, fused, chunk, adapter),
            vocab_size=arch.padded_vocab_size(parallel.tensor),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            vp_stage=chunk,
        )
        for chunk in chunks
    ]
    if arch.rope_scaling:
        for model in models:
            # megatron-core's own scalings have fixed bounds (Llama 3's) or a kernel that is not fused (YaRN's).
            own = model.rotary_pos_emb.inv_freq
            model.rotary_pos_emb.inv_freq = arch.rope_scaling.scaled(arch.rope_theta, arch.head_dim).to(own.device)
    return models


def data_parallel_model(
    chunks: list[GPTModel], config: TransformerConfig, parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """Wrap chunks that are complete: with gradient buffers in fp32, which the data-parallel ranks sum."""
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
    )
    return [
        DistributedDataParallel(config, reduction, Float16Module(config, chunk) if config.bf16 else chunk)
        for chunk in chunks
    ]


def _layer_spec(config: TransformerConfig, fused: bool, chunk: int | None, adapter: AdapterSpec | None):
    if fused:
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        return _with_norms_apart(layer, config) if adapter else layer
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    if config.num_moe_experts:
        # The local spec stores this norm as if an MLP followed it; Transformer Engine's spec, which GPUs run, does not.
        keys = layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = {k: v for k, v in keys.items() if "pre_mlp_layernorm" not in k}
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = CausalAttention
    # The block's own submodules, so that the final norm is ours as well.
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, chunk), layer_norm=RMSNorm)


def _with_norms_apart(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Give Transformer Engine's layer norms of their own: fused with a linear layer they hide its input."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # needs Transformer Engine

    engine, parts = TESpecProvider(), layer.submodules
    parts.input_layernorm = engine.layer_norm()
    parts.self_attention.submodules.linear_qkv = engine.column_parallel_linear()
    if not config.num_moe_experts:
        parts.pre_mlp_layernorm = engine.layer_norm()
        parts.mlp.keywords["submodules"].linear_fc1 = engine.column_parallel_linear()
    return layer
