"""Adam through megatron-core, with its learning-rate schedule."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_egrsd.config import OptimizerConfig


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core's optimizers behind this one: one for dense and one for expert weights, or itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def build_optimizer(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, updates: int, dtype: torch.dtype, distributed: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the model's chunks and a schedule for `updates` optimizer steps. Norms and biases are not decayed."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(settings, chunks, config_overrides=get_standard_config_overrides(settings))
    scheduler = OptimizerParamScheduler(
        optimizer,
        # megatron-core's warm-up reaches init_lr at update 0; starting at zero would waste that update.
        init_lr=config.lr / (config.warmup_steps + 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(updates, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=updates,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
