"""Build the engine of a run from its configuration."""

from megatron_egrsd.config import Config
from megatron_egrsd.engine.distributed import Facts
from megatron_egrsd.engine.engine import Engine


def build_engine(config: Config, facts: Facts | None = None, *, needs_teacher: bool) -> Engine:
    """Give `Engine` its sections of `config`, which never says by itself whether its objective needs a teacher."""
    return Engine(
        config.model,
        config.parallel,
        config.optimizer,
        config.teacher,
        updates=config.steps * config.optimizer.updates_per_batch,
        rollouts_per_update=config.rollouts_per_update,
        temperature=config.score_temperature,
        seed=config.seed,
        needs_teacher=needs_teacher,
        needs_reference=bool(config.objective.kl_coef),
        facts=facts,
    )
