"""The group advantage of GRPO, one rollout at a time."""

import statistics


def advantages(batch: list[dict]) -> list[float]:
    """(reward - mean) / standard deviation, over the rollouts of the same prompt."""
    result = []
    for rollout in batch:
        rewards = [other["reward"] for other in batch if other["group"] == rollout["group"]]
        result.append((rollout["reward"] - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-6))
    return result
