"""python -m benchmarks.reproduce_paper, from the repository's root: run cells, and write the page."""

import argparse
import shlex
import sys
from pathlib import Path

from benchmarks.reproduce_paper.cells import MODELS, Cell, chosen
from benchmarks.reproduce_paper.site import Site
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.planning.machines import MACHINES


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.reproduce_paper", description=__doc__)
    found.add_argument("--output", type=Path, default=Path("runs/paper"), help="directory that every node sees")
    found.add_argument("--model", action="append", default=[], type=_pair, metavar="NAME=DIR", dest="models",
                       help=f"Hugging Face directory of {', '.join(MODELS)}; the others are left out")  # fmt: skip
    found.add_argument("--config", action="append", default=[], type=_pair, metavar="NAME=FILE", dest="configs",
                       help="configuration of a model in place of the paper's in examples/configs")  # fmt: skip
    found.add_argument("--data", type=Path, default=Path("data/train.jsonl"), help="training set")
    found.add_argument("--benchmarks", type=Path, default=Path("data/benchmarks"), help="directory of the six sets")
    found.add_argument("--gpus", type=int, default=8, help="of this node; 0: one process on the CPU")
    found.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="such as 'table3/*' or '8b/egrsd'")
    found.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="runs of each cell")
    found.add_argument("--train", default="", metavar="WORDS", help="further words of every training")
    found.add_argument("--evaluate", default="", metavar="WORDS", help="further words of every evaluation")
    found.add_argument("--machine", choices=list(MACHINES), default="H100", help="whose hours --dry-run calculates")
    found.add_argument("--dry-run", action="store_true", help="print the cells, their hours and disk; run nothing")
    found.add_argument("--page-only", action="store_true", help="write the page of what is finished; run nothing")
    return found


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if name not in MODELS or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with one of {', '.join(MODELS)}")
    return name, value


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 if no cell has failed, 1 if one has or somebody stopped it, 2 for bad arguments."""
    try:
        return _main(parser().parse_args(arguments))
    except (BadArgument, RunError) as error:
        print(f"reproduce_paper: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, BadArgument) else 1


def _main(options: argparse.Namespace) -> int:
    site = Site(
        options.output.absolute(), {name: Path(path).absolute() for name, path in options.models},
        options.data.absolute(), options.benchmarks.absolute(),
        {name: str(Path(path).absolute()) for name, path in options.configs},
        options.gpus, tuple(shlex.split(options.train)), tuple(shlex.split(options.evaluate)),
    )  # fmt: skip
    models = list(site.models) or list(MODELS) * options.dry_run
    cells = [Cell(setting, seed) for seed in options.seeds for setting in chosen(options.cells, models)]
    if options.dry_run:
        from benchmarks.reproduce_paper.estimate import plan

        print(plan(cells, site, MACHINES[options.machine] if site.gpus else None))
        return 0
    from benchmarks.reproduce_paper.page import write_page

    if options.page_only:
        print(write_page(site))
        return 0
    if not cells:
        raise BadArgument("no cell to run: give the directory of a model, such as --model 8b=/models/Qwen3-8B")
    site.check()
    from benchmarks.reproduce_paper.schedule import run_all

    outcome = run_all(cells, site)
    print(f"page {write_page(site)}")
    for cell, reason in outcome.failed.items():
        print(f"failed: {cell.key}: {reason}", file=sys.stderr)
    if outcome.stopped:
        print("reproduce_paper: stopped; the same command goes on from here", file=sys.stderr)
    return 1 if outcome.failed or outcome.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
