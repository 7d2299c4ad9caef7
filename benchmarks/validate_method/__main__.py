"""python -m benchmarks.validate_method run|mechanism|results, from the repository's root."""

import argparse
import sys
from pathlib import Path

from megatron_egrsd.errors import BadArgument, RunError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validate_method", description=__doc__)
    parser.add_argument("command", choices=["run", "mechanism", "results"])
    parser.add_argument("--output", type=Path, default=Path("runs/validation"), help="directory of the runs")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time, each with a server")
    parser.add_argument("--only", default="", help="run settings whose names start so")
    parser.add_argument("--objective", default="", help="file.py:Class of an objective of yours, to compare as well")
    page = Path("docs/measurements/results.md")
    parser.add_argument("--document", type=Path, default=page, help="page whose tables to fill")
    arguments = parser.parse_args()
    try:
        if arguments.command == "run":
            from benchmarks.validate_method.run import run_all

            run_all(arguments.output, arguments.lanes, arguments.only, arguments.objective)
        elif arguments.command == "mechanism":
            from benchmarks.validate_method.mechanism import main as mechanism

            mechanism(arguments.output)
        else:
            from benchmarks.validate_method.results import main as results

            results(arguments.output, arguments.document, arguments.objective)
    except (BadArgument, RunError) as error:
        print(f"validate_method: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, BadArgument) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
