"""The whole configuration: one tree of frozen dataclasses (config_reader.py fills it from YAML and the command line).

Everything that can be checked without a GPU, a model or a dataset is checked here, when a dataclass is made.
"""

from megatron_egrsd.config.evaluation import BenchmarksConfig, EvaluationConfig
from megatron_egrsd.config.logging import LoggingConfig, WandbConfig
from megatron_egrsd.config.lora import LoraConfig
from megatron_egrsd.config.model import DataConfig, ModelConfig
from megatron_egrsd.config.objective import ObjectiveConfig, TeacherConfig
from megatron_egrsd.config.optimizer import OptimizerConfig
from megatron_egrsd.config.parallel import ParallelConfig
from megatron_egrsd.config.rollout import RolloutConfig, ServersConfig, SyncConfig
from megatron_egrsd.config.run import CheckpointConfig, Config

__all__ = [
    "BenchmarksConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "ServersConfig",
    "SyncConfig",
    "TeacherConfig",
    "WandbConfig",
]
