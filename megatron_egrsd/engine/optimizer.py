"""Adam through megatron-core, with its learning-rate schedule."""

from typing import Any

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

_SETTINGS = ("lr", "max_lr", "min_lr", "betas", "eps")  # of a parameter group; the schedule sets its weight decay


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return megatron-core's optimizers behind this one: one for dense and one for expert weights, or itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def build_optimizer(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, updates: int, dtype: torch.dtype, distributed: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build AdamW over the model's chunks and a schedule for `updates` steps. Norms and biases are not decayed."""
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
        # At a resume the checkpoint brings the position in the schedule, the configuration its shape and its end.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def with_settings_of(saved: dict[str, Any], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Return a saved optimizer state with the rates and decays that `optimizer` was configured with.

    megatron-core finds a saved parameter group by its learning rates, and takes betas and eps from it. The settings
    are those of the configuration, so a resume may change them; moments and step counts stay as they were saved. It
    leaves out a step count of 0, which torch's Adam needs.
    """
    if "param_groups" in saved:
        own = optimizer.param_groups[0]  # the groups differ in wd_mult and is_expert_parallel, not in these
        settings = {key: own[key] for key in _SETTINGS if key in own}
        groups = [group | {key: v for key, v in settings.items() if key in group} for group in saved["param_groups"]]
        saved = saved | {"param_groups": groups}
        if "state" in saved and isinstance(parts(optimizer)[0].optimizer, torch.optim.Adam | torch.optim.AdamW):
            saved["state"].setdefault("common_step", torch.tensor(0.0))
    return {key: with_settings_of(v, optimizer) if isinstance(v, dict) else v for key, v in saved.items()}
