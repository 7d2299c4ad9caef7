"""Measure what routing replay changes: log-probs of SGLang and engine, with its experts and with the engine's own.

    python -m benchmarks.routing_replay [--model DIR] [--dtype bfloat16] [--tokens 64]

SGLang answers 24 prompts of made-up tokens; the engine scores the answers on one rank. Without --model it is a random
mixture of 8 layers, each with 32 experts of which 4 are chosen.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import table
from megatron_egrsd.config import Config, DataConfig, ModelConfig, RolloutConfig, ServersConfig
from megatron_egrsd.data.packing import Sequence
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers

PROMPTS = [[5 + i] * (1 + 7 * (i % 6)) for i in range(24)]


def make_mixture(path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        moe_intermediate_size=48,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a mixture of experts of Hugging Face; default: a random one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(arguments.model or Path(scratch, "model"))
        if not arguments.model:
            make_mixture(path)
        model, rollout = ModelConfig(str(path), arguments.dtype), RolloutConfig(max_response_tokens=arguments.tokens)
        servers = ServersConfig(max_total_tokens=16384, args={"enable-return-routed-experts": True})
        with RolloutServers(servers, model, 0, Path(scratch, "logs")) as running:
            answers = [a for [a] in RolloutClient(running, rollout).generate(PROMPTS, 1, routes=True)]

        from megatron_egrsd.engine.build import build_engine

        sampled = torch.cat([torch.tensor(a.log_probs) for a in answers])
        rows = []
        with build_engine(Config(model, DataConfig("unused"), rollout=rollout), needs_teacher=False) as engine:
            for name in ("SGLang's", "the engine's"):
                sequences = []
                for prompt, a in zip(PROMPTS, answers, strict=True):
                    shape = len(prompt) + len(a.response_ids) - 1, engine.arch.num_layers, engine.arch.experts_per_token
                    routes = np.frombuffer(a.routes, np.uint8).reshape(shape)
                    sequences.append(Sequence(prompt, a.response_ids, routes if name == "SGLang's" else None))
                scores = engine.score(sequences, engine.partition([len(s) for s in sequences]))
                apart = (torch.cat([scores[i].log_prob.cpu() for i in range(len(answers))]) - sampled).abs()
                changed = engine.passes.routing.share_changed(engine.device)
                rows.append([name, f"{changed:.2%}" if changed else "", f"{apart.mean():.1e}", f"{apart.max():.1e}"])
    print(f"\n{len(sampled)} tokens, {arguments.dtype}\n")
    print(table(["experts", "chosen otherwise by the engine", "mean difference, nats", "largest"], rows))


if __name__ == "__main__":
    main()
