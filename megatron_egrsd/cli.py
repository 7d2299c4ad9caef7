"""megatron-egrsd: train, evaluate, report, doctor.

Exit status: 0 success, 2 a request that cannot work, 130 interrupted, 1 anything else; the reason is one line on
stderr. Heavy imports happen inside the subcommand, so that help and mistakes are answered at once.
"""

import contextlib
import io
import os
import sys
import time

from megatron_egrsd.errors import BadArgument, RunError

_PATIENCE = 20.0  # seconds

USAGE = """\
usage: megatron-egrsd COMMAND ...

EGRSD and CL-EGRSD: on-policy self-distillation of Qwen3 reasoning models on Megatron-Core and SGLang.

commands:
  train --config FILE [--section.key VALUE ...] [--dry-run]
                     train; --dry-run prints the resolved configuration and plan and starts nothing
  evaluate --config FILE [--section.key VALUE ...]
                     accuracy, pass@k and response lengths of model.path on data.evaluation
  report RUN ...     the table before/after and the report page of a run, or of several compared
  report --tokens X  the token page of a run or scored dump: every token coloured by its weight
  doctor             what of the stack is installed, and what each missing piece costs

`megatron-egrsd train --help` lists every configuration key. On several ranks:
  torchrun --nproc-per-node 8 -m megatron_egrsd.cli train --config FILE
"""

TRAIN_USAGE = """\
megatron-egrsd train --config FILE [--section.key VALUE ...] [--dry-run]

  --dry-run             Print the resolved configuration and the plan; start nothing.

The keys below go into the YAML file as sections, or on the command line with dots; the later one wins:
  megatron-egrsd train --config examples/configs/tiny_cpu.yaml --objective.lookahead 4 --seed 1

"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        return _run(command, rest)
    except BadArgument as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "megatron_egrsd":
            raise
        return _fail(f"the package {error.name} is not installed; `megatron-egrsd doctor` lists what is missing", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _run(command: str, arguments: list[str]) -> int:
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif command == "--version":
        from megatron_egrsd import __version__

        print(__version__)
    elif command == "train":
        _train(arguments)
    elif command == "evaluate":
        from megatron_egrsd import evaluate

        evaluate.main(arguments)
    elif command == "report":
        from megatron_egrsd.report import command as report

        report.main(arguments)
    elif command == "doctor":
        if arguments:
            raise BadArgument("doctor takes no arguments")
        from megatron_egrsd.doctor import run_doctor

        return run_doctor()
    else:
        import difflib

        close = difflib.get_close_matches(command, ["train", "evaluate", "report", "doctor"], 1)
        hint = f"; did you mean {close[0]}?" if close else "; see megatron-egrsd --help"
        raise BadArgument(f"there is no command {command!r}{hint}")
    return 0


def _train(arguments: list[str]) -> None:
    from megatron_egrsd.config import parse_config

    if "-h" in arguments or "--help" in arguments:
        keys = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(keys):
            parse_config(["--help"])
        print(TRAIN_USAGE + keys.getvalue().partition("\n\n")[2], end="")  # without argparse's list of every key
        return
    config = parse_config([a for a in arguments if a != "--dry-run"])
    from megatron_egrsd import train

    if "--dry-run" in arguments:
        train.print_plan(config)
    else:
        train.main(config)


def _fail(reason: object, status: int) -> int:
    # Under torchrun every rank meets the same error; one line a node is enough. The moment one rank exits, torchrun
    # ends the others: the node's first rank, which has servers to close before it speaks, is waited for.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_PATIENCE)
    print(f"megatron-egrsd: error: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
