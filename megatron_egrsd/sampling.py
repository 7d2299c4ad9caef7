"""Prompts in, rewarded rollouts out: what training and evaluation share. Runs on the first rank only."""

import statistics
from collections.abc import Callable
from dataclasses import replace

from megatron_egrsd.rewards import score
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.samples import Prompt, Rollout


class Sampler:
    """Samples responses through SGLang, decodes and rewards them."""

    def __init__(self, client: RolloutClient, tokenizer, reward: Callable[[str, str], float]):
        self.client, self.tokenizer, self.reward = client, tokenizer, reward

    def sample(self, prompts: list[Prompt], n: int, temperature: float) -> list[Rollout]:
        """n rewarded rollouts of each prompt, those of one prompt together; `group` is the prompt's position."""
        generations = self.client.generate([p.student_ids for p in prompts], n, temperature=temperature)
        rollouts = [
            Rollout(
                prompt=prompt,
                group=group,
                response_ids=g.response_ids,
                rollout_log_probs=g.log_probs,
                finish_reason=g.finish_reason,
                weight_version=g.weight_version,
                text=self.tokenizer.decode(g.response_ids, skip_special_tokens=True),
            )
            for group, (prompt, answers) in enumerate(zip(prompts, generations, strict=True))
            for g in answers
        ]
        rewards = score(rollouts, self.reward)
        return [replace(rollout, reward=reward) for rollout, reward in zip(rollouts, rewards, strict=True)]


def summarize(rollouts: list[Rollout]) -> dict[str, float]:
    """avg@k and pass@k accuracy, response length in tokens, share cut off by the length limit."""
    lengths = sorted(len(r.response_ids) for r in rollouts)
    best: dict[int, float] = {}
    for r in rollouts:
        best[r.group] = max(best.get(r.group, 0.0), float(r.reward > 0.5))
    return {
        "accuracy": statistics.fmean(float(r.reward > 0.5) for r in rollouts),
        "pass": statistics.fmean(best.values()),
        "length/mean": statistics.fmean(lengths),
        "length/median": statistics.median(lengths),
        "length/p95": lengths[min(len(lengths) - 1, round(0.95 * len(lengths)))],
        "truncated": statistics.fmean(r.finish_reason == "length" for r in rollouts),
        "k": len(rollouts) / len(best),
        "problems": len(best),
    }
