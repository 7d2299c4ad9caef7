"""Published models: the sizes in their config.json, and the parameters in their safetensors (a tied head once)."""

from megatron_egrsd.planning.cluster import MODELS as PUBLISHED

__all__ = ["PARAMETERS", "PUBLISHED"]
PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-4B-Thinking-2507": 4_022_468_096,
    "Qwen3-30B-A3B-Thinking-2507": 30_532_122_624,
    "Qwen3-235B-A22B-Thinking-2507": 235_093_634_560,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "SmolLM2-135M": 134_515_008,
}
