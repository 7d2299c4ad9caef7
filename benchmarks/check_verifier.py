"""How far the verifier agrees with labels: `python -m benchmarks.check_verifier GRADED.jsonl`.

Each line of the file is an object with `response` (or `solution`), `answer` (or `ground_truth`) and `correct` (or
`is_correct`). Prints the agreement and every disagreement. Exit status 0; 1 below --at-least; 2 for a bad file.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from megatron_egrsd.data.problems import read_rows
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.rewards.reward import math_reward

FIELDS = (("response", "solution"), ("answer", "ground_truth"), ("correct", "is_correct"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", help=".jsonl or .parquet files of graded responses")
    parser.add_argument("--at-least", type=float, default=0.0, help="fail below this agreement, e.g. 0.995")
    parser.add_argument("--tail", type=int, default=200, help="characters of a response that are shown")
    args = parser.parse_args(argv)
    agreed = total = 0
    started = time.perf_counter()
    try:
        for file in args.files:
            for where, _, row in read_rows(file):
                response, answer, correct = (_field(row, names, where) for names in FIELDS)
                says = math_reward(str(response), str(answer)) > 0.5
                agreed, total = agreed + (says == bool(correct)), total + 1
                if says != bool(correct):
                    print(f"{where}: label {bool(correct)}, verifier {says}")
                    print(f"    answer   ...{json.dumps(str(answer)[-args.tail :], ensure_ascii=False)}")
                    print(f"    response ...{json.dumps(str(response)[-args.tail :], ensure_ascii=False)}")
    except BadArgument as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    if not total:
        print(f"{Path(sys.argv[0]).name}: error: no graded responses in {' '.join(args.files)}", file=sys.stderr)
        return 2
    print(f"{agreed} of {total} agree ({agreed / total:.2%}) in {time.perf_counter() - started:.1f} s")
    return 0 if agreed / total >= args.at_least else 1


def _field(row: dict, names: tuple[str, str], where: str):
    for name in names:
        if name in row:
            return row[name]
    raise BadArgument(f"{where} has neither {names[0]!r} nor {names[1]!r}")


if __name__ == "__main__":
    sys.exit(main())
