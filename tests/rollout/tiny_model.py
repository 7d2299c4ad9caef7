"""A random Qwen3 of 0.3M parameters with a trivial tokenizer: enough for SGLang, made in a second."""

from pathlib import Path

import torch

VOCAB_SIZE = 47  # SGLang pads the embedding to 64 rows: the padding takes part in every test
EOS = 2


def make_tiny_model(directory: Path, seed: int = 0) -> Path:
    """Write config, weights (fp32) and tokenizer into `directory`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = ["<unk>", "<pad>", "<eos>"] + [f"w{i}" for i in range(VOCAB_SIZE - 3)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>",
                            eos_token="<eos>").save_pretrained(directory)  # fmt: skip
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=VOCAB_SIZE, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=512,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS, pad_token_id=1,
                         initializer_range=0.1)  # fmt: skip
    Qwen3ForCausalLM(config).float().save_pretrained(directory)
    return directory
