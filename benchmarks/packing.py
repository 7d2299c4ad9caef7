"""The waste of packing for realistic response lengths: the table of docs/measurements/scaling.md.

    python -m benchmarks.packing

A step has groups of 8 samples. The teacher scores all of them; those of degenerate groups (all right or all wrong) are
not trained.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.measure import table
from megatron_egrsd.data.packing import balance, balance_passes, schedule

_DATA = Path(__file__).parents[1] / "tests/data"
BUDGET = 17408


def _characters(file: str, key: str) -> list[int]:
    return [len(json.loads(line)[key]) for line in (_DATA / file).read_text(encoding="utf-8").splitlines()]


_GSM8K, _AIME = _characters("gsm8k_test.jsonl", "answer"), _characters("aime24.jsonl", "solution")

# Tokens of a response. The two sets' solutions lend the shape (3 characters a token; a model reasons longer than the
# AIME solutions are); the third is a reasoning model's long tail, cut at 16k.
RESPONSES: dict[str, Callable[[random.Random, int], list[int]]] = {
    "GSM8K": lambda rng, n: [rng.choice(_GSM8K) // 3 + rng.randint(1, 30) for _ in range(n)],
    "AIME": lambda rng, n: [rng.choice(_AIME) * rng.randint(1, 5) // 3 + rng.randint(1, 300) for _ in range(n)],
    "long-tailed": lambda rng, n: [min(16384, 1 + round(rng.lognormvariate(math.log(3000), 0.9))) for _ in range(n)],
}


@dataclass(frozen=True)
class PassWaste:
    """One pass over all ranks: samples a rank, micro-batches and the fewest possible, and two shares of its time.

    `imbalance` is what the most loaded rank has above the mean. `waiting` is the share of ranks x time that is no work
    if the n-th micro-batches of all ranks take as long as the longest of them.
    """

    samples: float
    micro_batches: int
    fewest: int
    imbalance: float
    waiting: float


def step_waste(name: str, ranks: int, samples: int, degenerate: float, seed: int, budget: int = BUDGET, *,
               both: bool = True) -> list[PassWaste]:  # fmt: skip
    """Return the waste of scoring and training pass of a step; not `both` balances the sum of their costs."""
    rng = random.Random(seed)
    responses = RESPONSES[name](rng, ranks * samples)
    signal = [rng.random() >= degenerate for _ in range(ranks * samples // 8)]
    scored = [400 + n for n in responses]
    trained = [100 + n if signal[i // 8] else 0 for i, n in enumerate(responses)]
    together = [s + 3 * t for s, t in zip(scored, trained, strict=True)]
    partition = balance_passes(scored, trained, ranks) if both else balance(together, ranks)
    return [_pass_waste(costs, partition, budget) for costs in (scored, trained) if any(costs)]


def _pass_waste(costs: list[int], partition: list[list[int]], budget: int) -> PassWaste:
    per_rank = [[costs[i] for i in part if costs[i]] for part in partition]
    totals, ranks = [sum(own) for own in per_rank], len(per_rank)
    plan = schedule(per_rank, budget)
    loads = [[sum(own[i] for i in part) for part in parts] for own, parts in zip(per_rank, plan, strict=True)]
    computed = [[-(-load // 8) * 8 for load in rank] for rank in loads]  # padded for sequence parallelism at TP 8
    time = sum(max(turn) for turn in zip(*computed, strict=True))
    return PassWaste(
        samples=sum(map(len, per_rank)) / ranks,
        micro_batches=len(plan[0]),
        fewest=-(-max(totals) // budget),
        imbalance=max(totals) / (sum(totals) / ranks) - 1,
        waiting=1 - sum(totals) / (ranks * time),
    )


def main() -> None:
    columns = {name: (name, 0.0, True) for name in RESPONSES}
    columns["long-tailed, half of the groups degenerate"] = ("long-tailed", 0.5, True)
    columns["the same, balanced by the sum of both passes"] = ("long-tailed", 0.5, False)
    rows = []
    for samples in (8, 16, 32, 64):
        cells = []
        for name, degenerate, both in columns.values():
            steps = [step_waste(name, ranks, samples, degenerate, seed, both=both)
                     for ranks in (8, 32) for seed in range(40)]  # fmt: skip
            waiting, imbalance = (fmean(max(getattr(p, field) for p in step) for step in steps)
                                  for field in ("waiting", "imbalance"))  # fmt: skip
            cells.append(f"{waiting:.1%} ({imbalance:.1%})")
        rows.append([samples, *cells])
    print(table(["samples a rank", *columns], rows))


if __name__ == "__main__":
    main()
