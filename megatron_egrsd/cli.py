"""The commands of megatron-egrsd.

Exit status: 0 success, 2 a request that cannot work, 130 interrupted, 1 anything else; the reason is one line on
stderr. Heavy imports happen inside the subcommand, so that help and mistakes are answered at once.
"""

import argparse
import contextlib
import functools
import importlib
import io
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.system import torchrun
from megatron_egrsd.system.files import disk_error, handles_error

_PATIENCE = 20.0  # seconds

TRAIN_USAGE = """\
megatron-egrsd train --config FILE [--section.key VALUE ...] [--dry-run]

  --dry-run             Print the resolved configuration and the plan; start nothing. Refuse what cannot work.
  --world-size N        Training ranks to plan for; default: torchrun's, else one.
  --gpu-memory 80GB     Memory of a GPU to plan for; default: this machine's.
  --print KEY           Print the value of one key of the resolved configuration; start nothing.

The keys below go into the YAML file as sections, or on the command line with dots; the later one wins:
  megatron-egrsd train --config examples/configs/tiny_cpu.yaml --objective.lookahead 4 --seed 1

"""


def main(argv: list[str] | None = None, name: str = "megatron-egrsd") -> int:
    """Run one command and return the exit status. `name` begins the line on stderr that says why a command failed."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        with _interruptible():
            return _run(command, rest) or 0
    except SystemExit as exit:  # argparse has printed the help
        return int(exit.code or 0)
    except (BadArgument, RunError) as error:
        return _fail(name, error, error.exit_status)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "megatron_egrsd":
            raise
        return _fail(
            name, f"the package {error.name} is not installed; `megatron-egrsd doctor` lists what is missing", 1
        )
    except (OSError, RuntimeError) as error:
        if not (sentence := handles_error(error) or disk_error(error)):
            raise
        return _fail(name, sentence, 1)
    except KeyboardInterrupt as interrupt:
        return _fail(name, "; ".join(["interrupted", *interrupt.args]), 130)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt after a Ctrl-C, also if torch or megatron-core have made another exception of it."""
    # Another handler is the caller's own; a shell's background job ignores the signal; a thread cannot set a handler.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupts: list[int] = []

    def note(number, frame):
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except (BadArgument, RunError):
        raise
    except Exception as error:
        if not interrupts:
            raise
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(command: str, words: list[str]) -> int | None:
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif command == "--version":
        from megatron_egrsd import __version__

        print(__version__)
    elif command in COMMANDS:
        return COMMANDS[command][0](words)
    else:
        import difflib

        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else "; see megatron-egrsd --help"
        raise BadArgument(f"there is no command {command!r}{hint}")
    return None


def _train(arguments: list[str]) -> None:
    from megatron_egrsd.config_reader import nearest_key, parse_config, valid_keys

    if "-h" in arguments or "--help" in arguments:
        keys = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(keys):
            parse_config(["--help"])
        print(TRAIN_USAGE + keys.getvalue().partition("\n\n")[2], end="")  # without argparse's list of every key
        return
    key, dry_run, words = _options([re.sub("^--resume(?=$|=)", "--checkpoint.resume", a) for a in arguments])
    config = parse_config(words)
    if config.evaluation.protocol:
        raise BadArgument("evaluation.protocol is for megatron-egrsd evaluate; it would change training's responses")
    if key is not None:
        if key not in valid_keys():
            raise BadArgument(f"no configuration key is called {key}{nearest_key(key)}")
        print(functools.reduce(getattr, key.split("."), config))
    elif dry_run is not None:
        from megatron_egrsd.planning.plan import print_plan

        print_plan(config, **dry_run)
    else:
        from megatron_egrsd import train

        train.main(config)


def _options(arguments: list[str]) -> tuple[str | None, dict | None, list[str]]:
    """Return the key to print, if any, the arguments of print_plan in a dry run, and the words that are left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--print")
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise BadArgument(f"{error.argument_name}: {error.message}") from None
    ranks, memory = options.world_size, options.gpu_memory
    if not options.dry_run:
        for name, value in (("world-size", ranks), ("gpu-memory", memory)):
            if value is not None:
                raise BadArgument(f"--{name} goes with --dry-run; torchrun sets the ranks of a run")
        return options.print, None, rest
    if ranks is not None and not (ranks.isdecimal() and int(ranks) > 0):
        raise BadArgument(f"--world-size is {ranks!r}; it must be a positive whole number")
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?Gi?B", memory or "1GB", re.IGNORECASE)
    if not size or float(size[1]) == 0:
        raise BadArgument(f"--gpu-memory is {memory!r}; give a size such as 80GB")
    return (
        options.print,
        {
            "ranks": None if ranks is None else int(ranks),
            # 2^30, as the vendors of GPUs count: an H100 of 80 GB has 79.6 GiB.
            "gpu_memory": None if memory is None else int(float(size[1]) * 2**30),
        },
        rest,
    )


def _fail(name: str, reason: object, status: int) -> int:
    # Under torchrun every rank meets the same error; one line a node is enough. The moment one rank exits, torchrun
    # ends the others: the node's first rank, which has servers to close before it speaks, is waited for.
    if torchrun.local_rank() != 0:
        time.sleep(_PATIENCE)
    print(f"{name}: {'error: ' if status else ''}{' '.join(str(reason).split())}", file=sys.stderr)
    return status


def _doctor(words: list[str]) -> int | None:
    if "-h" in words or "--help" in words:
        print(f"usage: megatron-egrsd doctor [MODEL DATA [--section.key VALUE ...]]\n\n{COMMANDS['doctor'][1]}")
        return None
    if not words:
        from megatron_egrsd.doctor import run_doctor

        return run_doctor()
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise BadArgument("doctor takes no arguments, or MODEL and DATA: a model's directory and a file of problems")
    from megatron_egrsd.config_reader import parse_config
    from megatron_egrsd.planning.inspection import inspect

    model, data, *rest = words
    config = parse_config([*rest, "--model.path", model, "--data.train", data])
    return 0 if inspect(config) else 1


def _main_of(module: str) -> Callable[[list[str]], None]:
    """Return a function that imports `module` of this package and calls its main."""
    return lambda words: importlib.import_module(f"megatron_egrsd.{module}").main(words)


# Name -> the function to call with the words behind the name, and the text of the usage.
COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "train": (_train, """\
  train --config FILE [--section.key VALUE ...] [--dry-run [--world-size N] [--gpu-memory 80GB]]
                     train; --dry-run prints the resolved configuration and plan and starts nothing
"""),
    "evaluate": (_main_of("evaluation.command"), """\
  evaluate SET... --model.path DIR [--section.key VALUE ...]
                     accuracy, pass@k, majority@k and lengths of a checkpoint on aime24, gsm8k, FILE, ...
"""),
    "report": (_main_of("report.command"), """\
  report RUN ...     the table before/after and the report page of a run, or of several compared
  report --tokens X  the token page of a run or scored dump: every token coloured by its weight
  report --mechanism X
                     the paper's Figure 4 of a run or scored dump: weights by entropy, regimes of tokens
"""),
    "watch": (_main_of("watch.command"), """\
  watch OUTPUT       a run in this terminal while it goes on: progress, curves, one response with coloured tokens;
                     --page: as a page that loads itself again
"""),
    "prepare-data": (_main_of("preparation.command"), """\
  prepare-data FILE... --evaluation FILE -o TRAIN.jsonl
                     a training set in this project's schema, without the problems of evaluation sets
"""),
    "convert": (_main_of("hf.command"), """\
  convert to-megatron|to-hf|verify --hf-path DIR --megatron-path DIR
                     weights between Hugging Face and Megatron-LM, compared bit by bit
  convert merge --hf-path DIR --adapter DIR --output DIR
                     a model with its adapter added in
"""),
    "plan": (_main_of("planning.command"), """\
  plan --models M... --gpus N...
                     how to divide a cluster between training and serving, and what a step takes
"""),
    "doctor": (_doctor, """\
  doctor             what of the stack is installed, and what each missing piece costs
  doctor MODEL DATA  what a run would read: prompts of student and teacher, lengths, answers, stop tokens, bad rows
"""),
}  # fmt: skip

USAGE = f"""\
usage: megatron-egrsd COMMAND ...

EGRSD and CL-EGRSD: on-policy self-distillation of Qwen3, Qwen2 and Llama models on Megatron-Core and SGLang.

commands:
{"".join(text for _, text in COMMANDS.values())}
`megatron-egrsd train --help` lists every configuration key. On several ranks:
  torchrun --nproc-per-node 4 -m megatron_egrsd.cli train --config FILE
"""


if __name__ == "__main__":
    sys.exit(main())
