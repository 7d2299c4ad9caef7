"""EGRSD and CL-EGRSD: on-policy self-distillation of Qwen3, Qwen2 and Llama models on Megatron-Core and SGLang."""

__version__ = "0.1.0"
