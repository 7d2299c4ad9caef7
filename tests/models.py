"""Small random checkpoints for tests."""

from pathlib import Path

import torch

LLAMA3_ROPE = {  # bounds between which two of the tiny models' frequencies lie
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# name -> (prefix of transformers' classes, sizes that differ)
FAMILIES = {
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen2": ("Qwen2", {"head_dim": 16}),  # always hidden / heads
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
}


def make_qwen3(path: Path, **sizes) -> Path:
    """Write a random Qwen3; with `num_experts` among the sizes it is a mixture of experts."""
    return make_model(path, "qwen3_moe" if "num_experts" in sizes else "qwen3", **sizes)


def make_model(path: Path, family: str, *, seed: int = 0, tied: bool = True, vocab_size: int = 61, **sizes) -> Path:
    """Write a random model in Hugging Face format (weights and config only) and return `path`.

    The norms are not all ones, the biases not zero, and the head dimension is not hidden / heads if the family can have
    another, so that mix-ups show.
    """
    import transformers

    prefix, own = FAMILIES[family]
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rope_parameters": _PLAIN_ROPE,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(
        **{**defaults, **own, **sizes},
        vocab_size=vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path
