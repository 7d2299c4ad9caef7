"""A picture of a command in a terminal: runs it on a pseudo-terminal and writes what it printed as a PNG.

    CHROMIUM=/path/to/chromium python tools/terminal_image.py docs/images/watch.png megatron-egrsd watch RUN --once

The pictures of docs/images that show a terminal are made with it: 1280 pixels wide, `--columns` characters.
"""

import argparse
import contextlib
import fcntl
import html
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import termios

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

_ROWS = 48
_THEME = TerminalTheme(
    (20, 23, 26), (228, 231, 234),
    [(60, 66, 72), (226, 108, 22), (0, 158, 115), (230, 159, 0), (86, 180, 233), (204, 121, 167), (86, 180, 233),
     (228, 231, 234)],
)  # fmt: skip
_PAGE = """<meta charset="utf-8"><style>
body {{ margin: 0; padding: 22px; background: #14171a; width: 1280px; box-sizing: border-box; }}
pre {{ margin: 0; font: {size}px/1.32 "DejaVu Sans Mono", Menlo, Consolas, monospace; color: #e4e7ea; }}
.command {{ color: #6db7e8; }}
/* The font has no braille; the one that takes its place is wider. */
i {{ display: inline-block; width: {cell}px; font-style: normal; font-size: 0.82em; transform: scaleY(1.3); }}
</style><pre><span class="command">$ {command}</span>
{code}</pre>"""


def output_of(command: list[str], columns: int) -> str:
    """Return what a command prints on a terminal, control codes included."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    parts = []
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(master, 65536):
            parts.append(part)
    os.close(master)
    process.wait()
    return b"".join(parts).decode(errors="replace").replace("\r\n", "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("png")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parser.add_argument("--columns", type=int, default=120)
    options = parser.parse_args()
    console = Console(record=True, width=options.columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(output_of(options.command, options.columns)))
    code = console.export_html(theme=_THEME, inline_styles=True, code_format="{code}")
    size = (1280 - 44) / options.columns / 0.602  # the advance of DejaVu Sans Mono
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 100})
        code = re.sub("([\u2801-\u28ff])", r"<i>\1</i>", code)
        command = html.escape(shlex.join(options.command))
        page.set_content(_PAGE.format(command=command, code=code, size=f"{size:.2f}", cell=f"{0.602 * size:.3f}"))
        page.screenshot(path=options.png, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
