"""Convert weights between Hugging Face and Megatron-LM (torch_dist), check the result bit by bit, merge adapters.

    megatron-egrsd convert to-megatron --hf-path Qwen3-8B --megatron-path qwen3-8b
    megatron-egrsd convert verify      --hf-path Qwen3-8B --megatron-path qwen3-8b
    megatron-egrsd convert to-hf       --megatron-path qwen3-8b --hf-path Qwen3-8B-again
    megatron-egrsd convert merge       --hf-path Qwen3-8B --adapter run/output/adapter --output Qwen3-8B-trained

One process, no GPU, no parallel layout: any TP x PP x EP loads the result. docs/guides/conversion.md says how.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.system.arguments import Parser
from megatron_egrsd.system.arguments import path as file_path


def main(words: list[str]) -> None:
    """Run to-megatron, to-hf, verify or merge with the `words` behind `megatron-egrsd convert`.

    Raises BadArgument for a request that cannot work, RunError if the conversion fails.
    """
    arguments = _parser().parse_args(words)
    try:
        arguments.command(arguments)
    except (OSError, MemoryError) as error:
        raise RunError(str(error) or "out of memory") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was left at the output path") from None


_PATHS = {
    "--hf-path": "Hugging Face directory",
    "--megatron-path": "Megatron-LM checkpoint directory",
    "--adapter": "adapter of the model, in PEFT's format",
    "--output": "Hugging Face directory to write",
}


def _parser() -> Parser:
    parser = Parser(prog="megatron-egrsd convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function, text: str, *paths: str) -> Parser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        for path in paths:
            command.add_argument(path, required=True, type=file_path, help=_PATHS[path])
        command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                             help="round the weights to this type (default: keep theirs)")  # fmt: skip
        command.add_argument("--quiet", action="store_true", help="no progress bar")
        return command

    command = add("to-megatron", _to_megatron, "Hugging Face -> Megatron-LM", "--hf-path", "--megatron-path")
    _add_dry_run(command)
    command = add("to-hf", _to_hf, "Megatron-LM -> Hugging Face", "--megatron-path", "--hf-path")
    _add_dry_run(command)
    command.add_argument("--like", type=file_path, help="Hugging Face model to take config and tokenizer from, for a "
                         "checkpoint that does not carry them")  # fmt: skip
    _add_shard_size(command)
    command = add("verify", _verify, "compare every tensor of the two, bit by bit", "--hf-path", "--megatron-path")
    command.add_argument(
        "--report", type=file_path, metavar="FILE", help="write names, shapes and SHA-256 of all tensors"
    )
    command = add("merge", _merge, "adapter + its model -> Hugging Face", "--hf-path", "--adapter", "--output")
    _add_dry_run(command)
    _add_shard_size(command)
    return parser


def _add_dry_run(command: Parser) -> None:
    command.add_argument("--dry-run", action="store_true", help="check the input, print the plan, write nothing")


def _add_shard_size(command: Parser) -> None:
    command.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file (default: 5)")


def _to_megatron(arguments: argparse.Namespace) -> None:
    from megatron_egrsd.hf.convert import ToMegatron

    _run(ToMegatron(arguments.hf_path, arguments.megatron_path, _dtype(arguments)), arguments)


def _to_hf(arguments: argparse.Namespace) -> None:
    shard_bytes = _shard_bytes(arguments)
    from megatron_egrsd.hf.convert import ToHF

    _run(ToHF(arguments.megatron_path, arguments.hf_path, arguments.like, _dtype(arguments), shard_bytes), arguments)


def _merge(arguments: argparse.Namespace) -> None:
    shard_bytes = _shard_bytes(arguments)
    from megatron_egrsd.hf.merge import Merge

    _run(Merge(arguments.hf_path, arguments.adapter, arguments.output, _dtype(arguments), shard_bytes), arguments)


def _shard_bytes(arguments: argparse.Namespace) -> int:
    shard_bytes = arguments.shard_size * 1e9
    if not 0 < shard_bytes < math.inf:
        raise BadArgument(f"--shard-size is {arguments.shard_size:g}, but must be positive and finite")
    return int(shard_bytes)


def _run(conversion, arguments: argparse.Namespace) -> None:
    from megatron_egrsd.hf.staging import check_space

    print(conversion.describe())
    if arguments.dry_run:
        check_space(conversion.target, conversion.nbytes)
        return
    with _progress(conversion.nbytes, arguments.quiet) as advance:
        conversion.run(advance)
    print(f"wrote {conversion.target}")


def _verify(arguments: argparse.Namespace) -> None:
    from megatron_egrsd.hf.checkpoint import HFCheckpoint
    from megatron_egrsd.hf.convert import raise_problems, weight_bytes
    from megatron_egrsd.hf.mapping import hf_shapes
    from megatron_egrsd.hf.verify import verify, write_report

    checkpoint = HFCheckpoint(arguments.hf_path)
    dtype = _dtype(arguments)
    total = weight_bytes(hf_shapes(checkpoint.architecture), dtype or checkpoint.dtype())
    with _progress(total, arguments.quiet) as advance:
        report = verify(arguments.hf_path, arguments.megatron_path, dtype, advance, arguments.report is not None)
    if arguments.report:
        write_report(report, arguments.report)
    for problem in report["problems"]:
        print(problem)
    raise_problems(report["problems"], arguments.megatron_path)
    print(f"{len(report['tensors'])} tensors are the same, bit by bit")


def _dtype(arguments: argparse.Namespace):
    import torch

    return getattr(torch, arguments.dtype) if arguments.dtype else None


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar with bytes and rate on stderr; yield the function to call with the bytes done."""
    from rich import progress
    from rich.console import Console

    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn(),
               progress.TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
