"""Small random Qwen3 checkpoints for tests."""

from pathlib import Path

import torch


def make_qwen3(path: Path, *, seed: int = 0, tied: bool = True, vocab_size: int = 61, **sizes) -> Path:
    """Write a random Qwen3 in Hugging Face format (weights and config only) and return `path`.

    The norms are not all ones and the head dimension is not hidden / heads, so that mix-ups show. With `num_experts`
    among the sizes it is a mixture of experts.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
    }
    config_class, model_class = Qwen3Config, Qwen3ForCausalLM
    if "num_experts" in sizes:
        config_class, model_class = Qwen3MoeConfig, Qwen3MoeForCausalLM
        defaults |= {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "norm_topk_prob": True}
    torch.manual_seed(seed)
    config = config_class(
        **{**defaults, **sizes},
        vocab_size=vocab_size,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path
