"""Find \\boxed{...} in a text."""

import re
from typing import NamedTuple

# "\\boxed 5" and "\\boxed x" are boxes; in "mark it with \\boxed as asked" the command is only mentioned.
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?= ?(?:[\d$.-]|[A-Za-z](?:\W*\Z|[.,;$}]|\n))))")
_FORM = re.compile(  # what stands in a box that only shows the form of an answer
    r"(?:\\text\w{0,2}\s?\{|[\[<_\s])*"
    r"(?:\.{2,}|…|\\[lcd]?dots[a-z]?|_{2,}|\?|#"
    r"|(?:your |the |my )?(?:final |numerical |numeric )?(?:answer|result|solution|value)(?: goes)?(?: here)?)"
    r"[\]>}_\s]*",
    re.IGNORECASE,
)
_MOST = 20  # boxes of one text, the last ones


class Box(NamedTuple):
    """A box: characters `start` to `end` of the text, with the `content` between its braces, stripped."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    """Return the last boxes of a text in order, those without an answer left out; of nested ones the outer."""
    found: list[Box] = []
    for match in list(_BOX.finditer(text))[-_MOST:]:
        start = match.end()
        if not match[0].endswith("{"):  # \\boxed 5
            content = re.match(r"[^\s$]{1,20}", text[start:])
            found += [Box(match.start(), start + content.end(), content[0])] if content else []
            continue
        depth, end = 1, start
        while end < len(text) and depth:
            if text[end] == "\\":
                end += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth and (not found or match.start() >= found[-1].end):
            found.append(Box(match.start(), end, text[start : end - 1].strip()))
    return [box for box in found if box.content and not is_form(box.content)]


def is_form(text: str) -> bool:
    """Return whether a text stands for an answer instead of being one: "...", "your answer"."""
    return bool(_FORM.fullmatch(text[:200].strip()))
