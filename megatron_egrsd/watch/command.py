"""`megatron-egrsd watch`: a run in a terminal or as a page, from its files alone, while it goes on."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.system.arguments import Parser, path

_DESCRIPTION = """\
watch OUTPUT         the run in this terminal: progress, curves, the latest steps, warnings, and one response with its
                     tokens coloured by their weight (train with dump_scores true); ends with the run or by Ctrl-C
watch OUTPUT --page  the same as a page that loads itself again; open it in a browser
watch OUTPUT --once  one picture, and the end; so it is if the output is no terminal

Reads the files of the run alone, and takes no lock: the run may be another user's, and on another machine.
"""


def _parser() -> Parser:
    parser = Parser(prog="megatron-egrsd watch", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run", type=path, metavar="OUTPUT", help="directory of a run, or one that it will write")
    parser.add_argument("--once", action="store_true", help="show one picture and end")
    parser.add_argument("--page", action="store_true", help="write a page instead (default: OUTPUT_watch.html)")
    parser.add_argument("--output", type=path, metavar="FILE", help="the page's file, with --page")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="time between pictures (5)")
    return parser


def main(arguments: list[str]) -> None:
    """Run the command until the run has ended, or until Ctrl-C."""
    options = _parser().parse_args(arguments)
    if options.output is not None and not options.page:
        raise BadArgument("--output names the file of --page; give both")
    if not 0.5 <= options.every <= 3600:
        raise BadArgument(f"--every is {options.every:g}; give seconds from 0.5 to 3600")
    from megatron_egrsd.watch.state import Reader

    reader = Reader(options.run)
    with contextlib.suppress(KeyboardInterrupt):
        if options.page:
            output = options.output or options.run.resolve().with_name(f"{options.run.resolve().name}_watch.html")
            _write_pages(reader, output, options.every, options.once)
        else:
            _show(reader, options.every, options.once)


def _write_pages(reader, output: Path, every: float, once: bool) -> None:
    from megatron_egrsd.watch.page import Page

    page, state = Page(output), reader.read()
    ended = once or state.stage == "finished"
    page.write(state, 0 if ended else every)
    print(output, flush=True)

    def show(state, error: str) -> None:
        page.write(state, 0 if state.stage == "finished" and not error else every, error)

    if not ended:
        _follow(reader, state, every, show)


def _show(reader, every: float, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from megatron_egrsd.watch.terminal import Picture

    console, state = Console(highlight=False), reader.read()
    if once or not console.is_terminal or state.stage == "finished":
        console.print(Picture(state, live=False))
        return
    with Live(Picture(state, live=True), console=console, screen=True, auto_refresh=False) as live:

        def show(state, error: str) -> None:
            live.update(Text(error) if error else Picture(state, live=True), refresh=True)

        live.refresh()
        state = _follow(reader, state, every, show)
    console.print(Picture(state, live=False))  # the last picture stays


def _follow(reader, state, every: float, show: Callable):
    """Call `show(state, error)` every so often until the run has ended; return the last state."""
    while state.stage != "finished":
        time.sleep(every)
        error = ""
        try:
            state = reader.read()
        except BadArgument as reason:  # perhaps a file is being copied; the last picture stays true
            error = str(reason)
        show(state, error)
    return state
