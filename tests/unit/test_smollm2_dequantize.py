"""The model that `make demo-llm` trains is the one of its GGUF file: weights, tokenizer and chat template."""

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.smollm2 import fetch_model
from megatron_egrsd.hf.architecture import Architecture

HEADS, KV_HEADS = 4, 2
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
NAMES = {  # Hugging Face's: GGUF's
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
    name = name.replace("model.layers", "blk")
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of queries or keys in GGUF's order: the two halves of a rotary pair stand side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model_and_file(tmp_path_factory):
    """A random Llama rounded to Q4_1, and the GGUF file of it, written from scratch."""
    directory = tmp_path_factory.mktemp("gguf")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "Ġ+"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, max_position_embeddings=128, rope_theta=100_000.0, rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    writer = gguf.GGUFWriter(directory / "small.gguf", "llama")
    for add, value in {
        writer.add_name: "small", writer.add_block_count: 2, writer.add_context_length: 128,
        writer.add_head_count: HEADS,
        writer.add_embedding_length: 64, writer.add_feed_forward_length: 96, writer.add_head_count_kv: KV_HEADS,
        writer.add_rope_freq_base: 100_000.0, writer.add_layer_norm_rms_eps: 1e-5, writer.add_vocab_size: len(words),
        writer.add_rope_dimension_count: 16, writer.add_tokenizer_model: "gpt2", writer.add_tokenizer_pre: "smollm",
        writer.add_token_list: words, writer.add_token_types: [3] * 3 + [1] * (len(words) - 3),
        writer.add_token_merges: ["Ċ Ċ", "Ġ +"], writer.add_bos_token_id: 1, writer.add_eos_token_id: 2,
        writer.add_unk_token_id: 0, writer.add_pad_token_id: 2, writer.add_chat_template: CHAT_TEMPLATE,
    }.items():  # fmt: skip
        add(value)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, weight in model.named_parameters():
        plain = weight.detach().numpy()
        if plain.ndim == 1:
            writer.add_tensor(gguf_name(name), plain)
            continue
        packed = gguf.quantize(plain, kind)
        weight.data = torch.from_numpy(gguf.dequantize(packed, kind))
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        packed = interleaved(packed, heads) if heads else packed  # whole rows are packed, so that they can move
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, directory / "small.gguf"


@pytest.mark.heavy
def test_weights_and_tokenizer_are_those_of_the_file(model_and_file, tmp_path):
    model, file = model_and_file
    fetch_model.dequantize(file, tmp_path / "model")

    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name
    ids = torch.arange(3, 40)[None]
    assert torch.equal(made(ids).logits, model(ids).logits)
    assert Architecture.from_pretrained(str(tmp_path / "model")).max_position_embeddings == 128

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("a\n\n12 + 3") == ["a", "ĊĊ", "1", "2", "Ġ+", "Ġ", "3"]
    assert tokenizer.decode(tokenizer.encode("é\n\n12 + 3")) == "é\n\n12 + 3"
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", CHAT_TEMPLATE)
