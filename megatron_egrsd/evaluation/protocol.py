"""The evaluation protocol of the EGRSD paper and its published results (arXiv 2605.13255, tables 2, 3, 5 and A4).

Six sets, avg@4 at T 1.0 and top-p 0.95 with up to 32,768 new tokens, thinking on; AIME24 is the mean of five runs.
Avg and AvgLen are means over the sets, Eff is Avg / (AvgLen / 1000). Each set counts the same in AvgLen (ours: over all
samples the short responses to GSM8K would decide the published values).
"""

import operator
import statistics
from pathlib import Path

from megatron_egrsd.config import Config, EvaluationConfig

RUNS = {"aime24": 5}  # times that a set is sampled, if more than once
SETS = {
    "aime24": "AIME24",
    "aime25": "AIME25",
    "hmmt25": "HMMT25",
    "math500": "MATH500",
    "minerva": "Minerva",
    "gsm8k": "GSM8K",
}

# Accuracy in per cent by set, in the order of SETS, and mean tokens (None: not published).
PUBLISHED: dict[str, dict[str, tuple[list[float], int | None]]] = {
    "Qwen3-4B": {
        "untrained": ([73.02, 65.00, 41.56, 86.93, 33.09, 93.96], 11_008),
        "SFT": ([58.61, 42.50, 30.83, 83.65, 26.47, 87.19], 9_070),
        "GRPO": ([73.06, 63.33, 45.00, 87.15, 32.90, 93.95], 11_809),
        "OPSD": ([74.48, 67.92, 43.12, 87.02, 33.23, 93.89], 11_787),
        "CRISP": ([74.06, 63.33, 40.94, 86.94, 32.84, 94.01], 11_157),
        "EGRSD": ([77.92, 68.75, 42.92, 87.17, 32.81, 93.88], 11_064),
        "CL-EGRSD": ([77.08, 67.08, 44.58, 86.92, 32.90, 94.26], 11_085),
    },
    "Qwen3-8B": {
        "untrained": ([75.11, 67.71, 45.10, 86.92, 34.32, 94.53], None),
        "SFT": ([73.61, 66.67, 46.67, 86.60, 33.92, 94.45], None),
        "GRPO": ([75.28, 71.67, 41.67, 86.60, 34.65, 94.58], None),
        "OPSD": ([73.75, 68.75, 45.84, 87.11, 34.94, 94.68], 12_097),
        "CRISP": ([76.04, 67.29, 42.92, 86.93, 34.47, 94.57], None),
        "EGRSD": ([76.67, 70.00, 45.42, 87.20, 35.48, 94.61], 11_836),
        "CL-EGRSD": ([77.22, 70.00, 52.50, 86.95, 34.83, 94.43], 12_232),
    },
    "AceReason-Nemotron-7B": {
        "untrained": ([65.56, 49.17, 37.50, 87.00, 33.09, 91.49], 8_382),
        "SFT": ([68.06, 49.17, 30.00, 86.35, 32.35, 91.64], 8_360),
        "GRPO": ([67.50, 50.83, 34.17, 86.85, 32.31, 91.49], 8_218),
        "OPSD": ([67.78, 49.17, 35.83, 86.15, 32.35, 89.48], 8_259),
        "CRISP": ([67.78, 49.17, 35.83, 86.70, 33.09, 91.94], 7_908),
        "CL-EGRSD": ([67.22, 52.50, 35.83, 86.90, 32.35, 93.91], 7_943),
    },
}


def protocol_keys(name: str) -> dict[str, object]:
    """Return the configuration keys that the protocol `name` sets, with their values; {} for no protocol."""
    if not name:
        return {}
    return {
        "evaluation.protocol": name,
        "evaluation.benchmarks.sets": list(SETS),
        "evaluation.rollouts_per_problem": 4,
        "evaluation.temperature": 1.0,
        "evaluation.top_p": 0.95,
        "evaluation.top_k": 0,
        "rollout.max_response_tokens": 32_768,
        "data.enable_thinking": True,
    }


def summary_columns(accuracies: list[float], lengths: list[float] | None) -> tuple[float, float | None, float | None]:
    """Return (Avg, AvgLen, Eff) of accuracies in per cent and mean tokens, one a set."""
    average = statistics.fmean(accuracies)
    if lengths is None:
        return average, None, None
    tokens = statistics.fmean(lengths)
    return average, tokens, average / (tokens / 1000)


def overridden(config: Config) -> dict[str, tuple[object, object]]:
    """Return the keys of sampling that differ from the protocol of `config`: key -> (value, the protocol's value)."""
    found = {}
    for key, value in protocol_keys(config.evaluation.protocol).items():
        own = operator.attrgetter(key)(config)
        if own != value and key != "evaluation.benchmarks.sets":  # a set that is left out shows in the table
            found[key] = own, value
    return found


def samples_per_problem(config: EvaluationConfig, name: str) -> int:
    """Return how many samples each problem of the set `name` gets."""
    return config.rollouts_per_problem * (RUNS.get(name, 1) if config.protocol else 1)


def published_models(path: str) -> list[str]:
    """Return the models of PUBLISHED that the directory `path` is called after, else all of them."""
    return [model for model in PUBLISHED if model.lower() in Path(path).name.lower()] or list(PUBLISHED)
