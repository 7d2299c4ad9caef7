"""Choose where a run's metrics go, besides its console, metrics.jsonl and TensorBoard."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_egrsd.config.check import require


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, with the names of metrics.jsonl; needs the package wandb.

    Args:
        project: Project that the run appears in; empty writes nothing for Weights & Biases. Entity, key and address of
            the server come from the environment (WANDB_ENTITY, WANDB_API_KEY, WANDB_BASE_URL) or `wandb login`.
        name: Name of the run; empty takes the last part of output.
        mode: "offline" writes files under output/wandb alone, which `wandb sync` uploads later.
    """

    project: str = ""
    name: str = ""
    mode: Literal["online", "offline"] = "online"

    def __post_init__(self):
        require(bool(self.project) or not self.name, "logging.wandb.name goes with logging.wandb.project; set both")


@dataclass(frozen=True)
class LoggingConfig:
    """Further places for the metrics.

    Args:
        wandb: Weights & Biases.
    """

    wandb: WandbConfig = field(default_factory=WandbConfig)
