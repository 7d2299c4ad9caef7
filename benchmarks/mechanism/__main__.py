"""Measure the gate's mechanism on a pretrained model without training it, beside the paper's Figure 4.

    python -m benchmarks.mechanism MODEL --problems FILE ... --output DIR [--batches N] [--KEY VALUE ...]
    python -m benchmarks.mechanism RUN --output DIR     # the scored dumps of a training run (dump_scores)

The model answers N batches of eight problems, four times each; student and teacher score the answers, the teacher
once in each of its contexts. Any key of the configuration may follow, such as --rollout.max_response_tokens. An
interrupted command goes on where it stopped, and a larger N adds batches.
Prints tables, and writes results.json and picture.png into DIR. docs/measurements/mechanism.md says what they mean.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.mechanism import page
from benchmarks.mechanism.contexts import CONTEXTS
from benchmarks.mechanism.picture import picture
from benchmarks.mechanism.results import Dumps, results
from benchmarks.validate_method.results import write_document
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.report.figures import save_png
from megatron_egrsd.report.scored_dump import dumps_of, load_scores
from megatron_egrsd.system.files import write_text

# The paper's Figure 4 has gamma 0.3 and W 5, its batches 32 responses. Four a prompt, so that there are siblings.
_DEFAULTS = (
    "--objective.preset=cl_egrsd", "--objective.attenuation=0.3", "--objective.lookahead=5", "--model.dtype=float32",
    "--rollout.rollouts_per_prompt=4", "--rollout.prompts_per_step=8", "--rollout.max_response_tokens=256",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mechanism", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="Hugging Face directory with --problems, else a run with scored dumps")
    parser.add_argument("--problems", nargs="+", default=[], metavar="FILE", help="problems with answers and solutions")
    parser.add_argument("--output", type=Path, required=True, help="directory for responses, scores and results")
    parser.add_argument("--batches", type=int, default=4, help="batches of problems (default: 4)")
    every = ",".join(CONTEXTS)
    parser.add_argument("--contexts", default=every, help=f"contexts of the teacher (default: {every})")
    parser.add_argument("--resamples", type=int, default=1000, help="draws of the bootstrap (default: 1000)")
    parser.add_argument("--document", type=Path, help="page whose tables to fill, with its picture")
    chosen, keys = parser.parse_known_args(arguments)
    try:
        found = results(_dumps(chosen, keys), chosen.resamples)
        _write(found, chosen.output, chosen.document)
    except (BadArgument, RunError) as error:
        print(f"mechanism: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, BadArgument) else 1
    return 0


def _dumps(chosen: argparse.Namespace, keys: list[str]) -> Dumps:
    """Sample and score if there are problems; then load the dumps of every context."""
    contexts = tuple(chosen.contexts.split(","))
    if unknown := [name for name in contexts if name not in CONTEXTS]:
        raise BadArgument(f"--contexts names {unknown[0]!r}; the contexts are {', '.join(CONTEXTS)}")
    if not chosen.problems:
        if keys:
            raise BadArgument(f"{keys[0]} changes nothing about a run that is there; remove it, or give --problems")
        return {"run": [load_scores(path) for path in dumps_of(Path(chosen.source)).values()]}
    from benchmarks.mechanism.dumps import Study, read, write_dumps

    words = [f"--model.path={chosen.source}", f"--data.train={chosen.problems[0]}", *_DEFAULTS]
    config = parse_config([*words, *keys])
    write_dumps(Study(config, contexts, read(chosen.problems)), chosen.batches, chosen.problems, chosen.output)
    there = [name for name in contexts if (chosen.output / name / "scores").is_dir()]
    return {name: [load_scores(path) for path in dumps_of(chosen.output / name).values()] for name in there}


def _write(found: dict, output: Path, document: Path | None) -> None:
    found = _plain(found)
    write_text(output / "results.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    tables, drawn = page.blocks(found), picture(found)
    save_png(drawn, output / "picture.png")
    print("\n\n".join(tables.values()), f"\n\n{output}/results.json, {output}/picture.png")
    if document:
        beside = document.with_suffix(".png")
        write_document(tables | {"picture": f"![The tables as bars and curves]({beside.name})"}, document)
        save_png(drawn, beside)


def _plain(value):
    """Return `value` with lists for arrays and None for numbers that are not finite, as JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


if __name__ == "__main__":
    sys.exit(main())
