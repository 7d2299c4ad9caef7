"""A command-line parser that raises BadArgument for a mistake."""

import argparse
from typing import NoReturn

from megatron_egrsd.errors import BadArgument


class Parser(argparse.ArgumentParser):
    """argparse's parser, with the description's line breaks kept and mistakes raised instead of printed."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise BadArgument(f"{message}; see {self.prog} --help")
