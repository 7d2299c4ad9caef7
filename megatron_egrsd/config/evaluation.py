"""Held-out evaluation, during training and by `megatron-egrsd evaluate`."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_egrsd.config.check import require_not_negative, require_positive, require_truncation


@dataclass(frozen=True)
class BenchmarksConfig:
    """Evaluation of a checkpoint by `megatron-egrsd evaluate`, which alone reads these keys.

    Args:
        sets: Names of benchmarks, files, or NAME=FILE (docs/guides/evaluation.md).
        directory: Directory with the files of benchmarks: aime24.jsonl, gsm8k.parquet, ...
        hub: Download a benchmark that is not in `directory` from the Hugging Face hub.
        instruction: Text below every problem, such as "Please reason step by step, and put your final answer within
            \\boxed{}."
        deterministic: A seed for every sample, and SGLang's deterministic inference: an evaluation repeats itself,
            interrupted or not. Slower on a GPU.
        like: Hugging Face directory with config.json and tokenizer, if model.path is a Megatron checkpoint without.
    """

    sets: list[str] = field(default_factory=list)
    directory: str = ""
    hub: bool = False
    instruction: str = ""
    deterministic: bool = True
    like: str = ""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation: avg@k at `temperature`, during training and by `megatron-egrsd evaluate`.

    Args:
        every: Steps between evaluations; the end is always evaluated. 0: only the end and, with `at_start`, the start.
        at_start: Evaluate before the first step, too.
        rollouts_per_problem: k of avg@k.
        temperature: Sampling temperature.
        top_p: Sample from the smallest set of tokens of this probability.
        top_k: Sample from the k most likely tokens; 0 from all.
        protocol: "egrsd_paper" evaluates as the EGRSD paper does: it sets the sets and the keys of sampling (any key
            given beside it overrides it), and adds the paper's table. For `evaluate` alone.
        benchmarks: The problems of `megatron-egrsd evaluate`, and how it samples.
    """

    every: int = 0
    at_start: bool = True
    rollouts_per_problem: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    protocol: Literal["", "egrsd_paper"] = ""
    benchmarks: BenchmarksConfig = field(default_factory=BenchmarksConfig)

    def __post_init__(self):
        require_positive(self, "evaluation", "rollouts_per_problem")
        require_not_negative(self, "evaluation", "every", "temperature")
        require_truncation(self, "evaluation")
