"""The command line of `megatron-egrsd evaluate`; evaluate.py does the work."""

import json

USAGE = """\
megatron-egrsd evaluate SET... [--config FILE] --model.path DIR --output DIR [--section.key VALUE ...]

  SET                   aime24, aime25, amc23, math500, minerva, gsm8k, hmmt25 (from evaluation.benchmarks.directory, or
                        the hub with --evaluation.benchmarks.hub true), a .jsonl or .parquet file, or NAME=FILE.

  megatron-egrsd evaluate aime24 gsm8k mine.jsonl --model.path runs/mine/hf --output runs/evaluation \\
      --evaluation.benchmarks.directory benchmarks --evaluation.rollouts_per_problem 16 --evaluation.temperature 0.6 \\
      --evaluation.top_p 0.95

The same command continues an interrupted evaluation. Keys: model, data, rollout, evaluation, seed and output of
`megatron-egrsd train --help`; those behind --config FILE win over the file's. More in docs/guides/evaluation.md.
"""


def main(arguments: list[str]) -> None:
    """Evaluate `model.path`. `arguments` are names of sets, then keys as for `train`; training keys have no effect."""
    if "-h" in arguments or "--help" in arguments:
        print(USAGE, end="")
        return
    from megatron_egrsd.config_reader import parse_config

    options = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    sets = ["--evaluation.benchmarks.sets", json.dumps(arguments[:options])] if options else []
    # Every configuration requires data.train; an evaluation does not read it.
    config = parse_config(["--data.train", "-", *arguments[options:], *sets])
    from megatron_egrsd.evaluation.evaluate import evaluate  # after the mistakes: it imports torch

    evaluate(config)
