"""Random checkpoints of any shape in milliseconds: a config, weights and the files around them."""

import json
from pathlib import Path

import torch

from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import hf_shapes
from megatron_egrsd.hf.safetensors_file import SafetensorsWriter

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 128,
    "vocab_size": 61,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
}
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
QWEN2 = DENSE | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "head_dim": 4,
    "use_sliding_window": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = DENSE | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_scaling": LLAMA3_ROPE,
    "tie_word_embeddings": False,
}
BESIDE = {
    "generation_config.json": '{"temperature": 0.6}',
    "tokenizer.json": '{"made": "up"}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}\n",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


def random_qwen3(path: Path, *, base: dict = DENSE, dtype: torch.dtype = torch.bfloat16, seed: int = 0,
                 shard_bytes: int = 1 << 30, **changes) -> Path:  # fmt: skip
    """Write a checkpoint of random bits (infinities and NaNs among them) and return `path`."""
    path.mkdir(parents=True)
    config = base | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, content in BESIDE.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    shapes = hf_shapes(Architecture.from_pretrained(path))
    writer = SafetensorsWriter(path, shapes, dtype, shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        bits = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator, dtype=torch.uint8)
        writer.write(name, bits.view(dtype))
    writer.finish()
    return path


def files(path: Path) -> dict[str, bytes]:
    """Return {relative name: content} of every file that is not weights or their index."""
    return {
        f.relative_to(path).as_posix(): f.read_bytes()
        for f in path.rglob("*")
        if f.is_file() and f.suffix != ".safetensors" and not f.name.endswith(".index.json")
    }
