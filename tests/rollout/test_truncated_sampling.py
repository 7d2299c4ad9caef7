"""Sampling under top-p and top-k, from a real server.

The tokens are those of the nucleus or of the k most likely ones. The log-probs that SGLang returns are those of
softmax(logits / temperature) before the truncation, not renormalised over the tokens that are left: the same numbers as
the engine's. An importance weight would need those after it (config/run.py refuses it).
"""

import pytest
import torch

from megatron_egrsd.rollout.client import RolloutClient
from tests.rollout.conftest import START_TIMEOUT, largest_difference, load_hf, rollout_config

pytestmark = pytest.mark.timeout(START_TIMEOUT + 100)
PROMPTS = [[5 + i] * (1 + 3 * i) for i in range(12)]
TEMPERATURE = 1.1
# As likely as the least likely token that is kept, up to rounding: SGLang may keep either.
TIE = 1e-5


@pytest.fixture(scope="module")
def hf(model_directory):
    return load_hf(model_directory)


def sample(servers, top_p: float, top_k: int):
    client = RolloutClient(servers, rollout_config(top_p=top_p, top_k=top_k, temperature=TEMPERATURE))
    return client.generate(PROMPTS, 4)


@torch.no_grad()
def ranks_and_masses(hf, answers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, of each sampled token, how many tokens are likelier and their mass; and all tokens' sorted probs."""
    likelier, masses, ordered = [], [], []
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for answer in group:
            ids = torch.tensor([prompt + answer.response_ids])
            probs = (hf(ids).logits[0, len(prompt) - 1 : -1].double() / TEMPERATURE).softmax(-1)
            own = probs.gather(1, torch.tensor(answer.response_ids)[:, None])
            above = probs > own * (1 + TIE)
            likelier.append(above.sum(-1))
            masses.append((probs * above).sum(-1))
            ordered.append(probs.sort(-1, descending=True).values)
    return torch.cat(likelier), torch.cat(masses), torch.cat(ordered)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 0), (1.0, 5), (0.7, 20)])
def test_tokens_are_inside_and_log_probs_are_those_before_the_truncation(top_p, top_k, servers, hf):
    servers.check_alive()
    answers = sample(servers, top_p, top_k)
    likelier, masses, ordered = ranks_and_masses(hf, answers)
    assert (masses < top_p + TIE).all()
    assert not top_k or (likelier < top_k).all()
    assert likelier.unique().numel() > 2  # it samples
    # Renormalised, every log-prob would be higher by -log of the mass that is left, which is far from 0 here.
    ahead = ordered.cumsum(-1) - ordered
    kept = (ahead < top_p) & (torch.arange(ordered.shape[1]) < (top_k or ordered.shape[1]))
    assert -(ordered * kept).sum(-1).log().mean() > 0.1
    assert largest_difference(hf, PROMPTS, answers, TEMPERATURE) < 1e-4


def test_without_truncation_tokens_are_outside_of_both(servers, hf):
    likelier, masses, _ = ranks_and_masses(hf, sample(servers, 1.0, 0))
    assert (masses > 0.7).any() and (likelier >= 20).any()
