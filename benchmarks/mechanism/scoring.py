"""Sampling and scoring of responses with transformers, on one process and with the prompts' keys and values kept."""

import numpy as np
import torch
from transformers import DynamicCache

from megatron_egrsd.config import RolloutConfig
from megatron_egrsd.vocab_parallel import log_prob_and_entropy


@torch.inference_mode()
def sample(model, prompts: list[list[int]], stop: list[int], config: RolloutConfig) -> list[list[int]]:
    """Return a response to each prompt, as `config` says, with the token of `stop` that ended it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[stop[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    asked = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "do_sample": True}
    asked |= {"max_new_tokens": config.max_response_tokens, "eos_token_id": stop, "pad_token_id": stop[0]}
    rows = model.generate(ids, attention_mask=mask, **asked)
    responses = []
    for row in rows[:, width:].tolist():
        end = next((place for place, token in enumerate(row, 1) if token in stop), len(row))
        responses.append(row[:end])
    return responses


@torch.inference_mode()
def score(model, prompt: list[int], responses: list[list[int]], temperature: float) -> list[np.ndarray]:
    """Return [2, T] fp32 for each response: log-prob of every token, and entropy of its distribution, in nats.

    The prompt passes the model once for all responses.
    """
    cache = DynamicCache(config=model.config)
    if prompt[:-1]:
        model(torch.tensor([prompt[:-1]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(responses))
    width = max(map(len, responses))
    padded = [response + [0] * (width - len(response)) for response in responses]  # behind all that is read
    rows = torch.tensor([[prompt[-1], *row[:-1]] for row in padded])
    logits = model(rows, past_key_values=cache, use_cache=True).logits
    log_prob, entropy = log_prob_and_entropy(logits, torch.tensor(padded), temperature=temperature)
    scored = torch.stack([log_prob, entropy], 1).float().numpy()
    return [row[:, : len(response)] for row, response in zip(scored, responses, strict=True)]


def score_all(model, prompts: list[list[int]], responses: list[list[int]], temperature: float) -> dict[int, np.ndarray]:
    """Return {place: [2, T]} as `score`, each response after its prompt; those with one prompt together."""
    members: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        members.setdefault(tuple(prompt), []).append(place)
    found = {}
    for prompt, places in members.items():
        scored = score(model, list(prompt), [responses[place] for place in places], temperature)
        found |= dict(zip(places, scored, strict=True))
    return found
