"""Build the engine of a run from its configuration."""

from megatron_egrsd.config import Config
from megatron_egrsd.engine.distributed import Facts, lost_contact
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.hf.adapter_file import AdapterFile, configured_spec
from megatron_egrsd.hf.architecture import Architecture


def build_engine(config: Config, facts: Facts | None = None, *, needs_teacher: bool) -> Engine:
    """Give `Engine` its sections of `config`, which never says by itself whether its objective needs a teacher.

    Raises the errors of Engine, and RunError if another rank is lost meanwhile.
    """
    initial = None
    if config.lora.init:
        initial = AdapterFile(config.lora.init, Architecture.from_pretrained(config.model.path)).__getitem__
    try:
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
            adapter=configured_spec(config.lora),
            initial_adapter=initial,
        )
    except RuntimeError as error:
        if reason := lost_contact(error):
            raise reason from error
        raise
