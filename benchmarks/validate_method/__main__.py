"""python -m benchmarks.validate_method all|plan|run|mechanism|results, from the repository's root."""

import argparse
import sys
from pathlib import Path

from megatron_egrsd.errors import BadArgument, RunError


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 if nothing has failed, 1 if a run has or somebody stopped it, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validate_method", description=__doc__)
    parser.add_argument("command", choices=["all", "plan", "run", "mechanism", "results"])
    parser.add_argument("--output", type=Path, default=Path("runs/validation"), help="directory of the runs")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time, each with a server")
    parser.add_argument("--only", default="", help="run settings whose names start so")
    parser.add_argument("--objective", default="", help="file.py:Class of an objective of yours, to compare as well")
    page = Path("docs/measurements/results.md")
    parser.add_argument("--document", type=Path, default=page, help="page whose tables to fill")
    options = parser.parse_args(arguments)
    try:
        return _main(options)
    except (BadArgument, RunError) as error:
        print(f"validate_method: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, BadArgument) else 1


def _main(options: argparse.Namespace) -> int:
    if options.lanes < 1:
        raise BadArgument(f"--lanes is {options.lanes}; at least one run is made at a time")
    if options.command == "plan":
        from benchmarks.validate_method.results import plan_blocks, write_document

        write_document(plan_blocks(), options.document)
    failed = {}
    if options.command in ("all", "run"):
        from benchmarks.validate_method.run import run_all

        failed = run_all(options.output, options.lanes, options.only, options.objective)
    try:
        if options.command in ("all", "mechanism"):
            from benchmarks.validate_method.mechanism import main as mechanism

            mechanism(options.output, options.lanes)
        if options.command in ("all", "results"):
            from benchmarks.validate_method.results import main as results

            results(options.output, options.document, options.objective)
    finally:
        for run, reason in failed.items():
            print(f"failed: {run.name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
