"""`megatron-egrsd evaluate`: accuracy, pass@k and response lengths of a checkpoint on a file of problems."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from megatron_egrsd.config import Config, parse_config
from megatron_egrsd.data.problems import load_problems
from megatron_egrsd.data.prompts import PromptBuilder
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.rewards import load_reward
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers
from megatron_egrsd.samples import save_rollouts
from megatron_egrsd.sampling import Sampler, summarize


def main(arguments: list[str]) -> None:
    """Evaluate `model.path` on `data.evaluation`; takes the words of `train`, and keys of training have no effect."""
    result = evaluate(parse_config(arguments))
    print(json.dumps(result, indent=2))


def evaluate(config: Config) -> dict[str, float]:
    """avg@k of a Hugging Face checkpoint through SGLang; every sample goes to output/samples.jsonl."""
    if not config.data.evaluation:
        raise BadArgument("data.evaluation is not set; give a .jsonl or .parquet file of problems")
    output = Path(config.output)
    if (output / "samples.jsonl").exists():
        raise BadArgument(f"{output / 'samples.jsonl'} exists already; choose another output")
    arch = Architecture.from_pretrained(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    builder = PromptBuilder(tokenizer, config.data, config.rollout.max_response_tokens, arch.max_position_embeddings)
    problems = load_problems(config.data.evaluation, config.data, privileged=False)
    prompts = [builder.build(p, privileged=False) for p in problems]
    with RolloutServers(config.rollout, config.model, config.seed, output / "logs") as servers:
        client = RolloutClient(servers, config.rollout, [tokenizer.eos_token_id])
        sampler = Sampler(client, tokenizer, load_reward(config.data.reward))
        settings = config.evaluation
        samples = sampler.sample(prompts, settings.rollouts_per_problem, settings.temperature)
    save_rollouts(samples, output / "samples.jsonl")
    return summarize(samples)
