"""`megatron-egrsd report`: the table and the report page of runs, or the token page of a scored dump."""

import argparse
from pathlib import Path

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.system.arguments import Parser, path

_DESCRIPTION = """\
report RUN ...       the table before/after, report.html and its pictures: accuracy against length, training,
                     entropy and gate, time; several runs are compared in one page
report --tokens X    the token page of a scored dump (train with dump_scores true): every token coloured by its weight
report --mechanism X  where the teacher is unsure: gap and weight by entropy, token regimes (the paper's Figure 4)
"""


def _parser() -> Parser:
    parser = Parser(prog="megatron-egrsd report", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--output",
        type=path,
        help="directory of the report (default: the run's, or ./report for several); a file with --tokens, --mechanism",
    )
    parser.add_argument("--tokens", type=path, metavar="X", help="a dump (scores/step_NNNNNN.jsonl), or a run")
    parser.add_argument("--mechanism", type=path, metavar="X", help="a dump, or a run: all its dumps")
    parser.add_argument("--step", type=int, help="with --tokens RUN: the step to show (default: the newest)")
    parser.add_argument(
        "--groups", type=_numbers, metavar="N,N", help="with --tokens: the groups to show (default: those that fit)"
    )
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,3") from None


def main(arguments: list[str]) -> None:
    """Run the command; prints the table and the paths of the files that it wrote."""
    options = _parser().parse_args(arguments)
    if options.tokens is not None:
        if options.runs:
            raise BadArgument("--tokens takes one dump or run and no further ones")
        from megatron_egrsd.report.token_page import write_token_page

        print(write_token_page(options.tokens, options.output, options.step, options.groups))
        return
    if options.mechanism is not None:
        if options.runs or options.step is not None or options.groups:
            raise BadArgument("--mechanism takes one dump or run, and --output alone beside it")
        from megatron_egrsd.report.mechanism import write_mechanism

        text, picture = write_mechanism(options.mechanism, options.output)
        print(f"{text}\n{picture}")
        return
    if options.step is not None or options.groups:
        raise BadArgument("--step and --groups belong to --tokens")
    if not options.runs:
        raise BadArgument("report takes the directories of runs: megatron-egrsd report RUN ...")
    from megatron_egrsd.report.run_page import write_report
    from megatron_egrsd.report.runs import read_runs
    from megatron_egrsd.report.table import summary_table

    runs = read_runs(options.runs)
    for run in runs:
        if len(runs) > 1:
            print(run.name)
        print(summary_table(run.evaluations[0], run.evaluations[-1]) if run.evaluations else "no evaluation")
    print(write_report(runs, options.output or (options.runs[0] if len(runs) == 1 else Path("report"))))
