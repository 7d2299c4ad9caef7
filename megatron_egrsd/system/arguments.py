"""A command-line parser that raises BadArgument for a mistake."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from megatron_egrsd.errors import BadArgument


def path(text: str) -> Path:
    """Return a path of the command line; a shell leaves the ~ of --output=~/run to the program."""
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """argparse's parser, with the description's line breaks kept and mistakes raised instead of printed."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise BadArgument(f"{message}; see {self.prog} --help")
