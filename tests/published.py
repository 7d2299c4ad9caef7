"""Published Qwen3 models: the sizes in their config.json, and the parameters in their safetensors."""

from megatron_egrsd.planning.cluster import MODELS as PUBLISHED

__all__ = ["PARAMETERS", "PUBLISHED"]
PARAMETERS = {
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
}
