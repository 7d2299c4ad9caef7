"""Extraction of the final answer from a response and from a dataset's field (equality.py compares the two).

Every loop and pattern is bounded, because a response is any string that a policy can sample.
"""

import re

from megatron_egrsd.data.boxes import boxes

_TAIL = 20_000  # characters at the end of a text that are searched for an answer
_SPAN = 400  # characters behind "the answer is" that are searched for an answer

_MARKER = re.compile(
    r"(?<!to )\banswer\b[^.\n:=]{0,60}?(?:\bis\b|\bare\b|\bbe\b|[:=])[:\s]*"  # the answer is, final answer:, answer =
    r"|^\W{0,4}A:\s"  # A: 18
    r"|^[#*\s]{0,6}(?:the )?(?:final )?answer[*\s]{0,6}\n"  # a heading
    r"|答案[是为：:\s]{1,3}",
    re.IGNORECASE | re.MULTILINE,
)
_HASHES = re.compile(r"####[ \t]*([^\s#][^\n]*)")
_HEADING = re.compile(r"\d+\.\s+[A-Z]|[A-Z][a-z]{2,}")  # "#### Step 3" with text below it is no answer
_MATH = re.compile(
    r"\$\$(.{1,2000}?)\$\$|(?<!\\)\$(.{1,2000}?)(?<!\\)\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    r"-?(?:\\?\$\s?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    r"(?:/\d+|e[+-]?\d+|\s?(?:\\times|\\cdot|[x×*])\s?10\^\{?[+-]?\d+\}?)?(?:\s?\\?%)?"
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}[\s,]|\n")  # a word that is not a LaTeX command
_VERB = re.compile(r"(?<![\\A-Za-z])(?:is|are|equals|be)\b:?\s*")
_BETWEEN = re.compile(  # text allowed between the parts of one list
    r"(?:[\s,;.$&]|\\[()\]\[]|\\q?quad\b|\\text ?\{ {0,9}(?:and|or)? {0,9}\}|\b(?:and|or)\b"
    r"|[a-zA-Z](?:_\{?\d\}?)?\s*=)*"
)


def final_answer(response: str) -> list[str]:
    """Return readings of a response's final answer, best first; empty if it has none.

    Only the part after the last </think> counts; a response whose thinking never ends has no answer. In this part the
    last \\boxed{} wins (unless "the final answer is" follows it), then "####", then "the answer is" or "A:", then the
    last formula or number. A second reading is added if boxes or formulas may be one list, or if a number is part of a
    sentence.
    """
    text = answer_part(response)
    return (_marked_answer(text) or _last_value(text)) if text else []


def states_answer(response: str) -> bool:
    """Return whether the response marks its answer: a box, "####", "the answer is", "A:", or nothing but an answer."""
    text = answer_part(response)
    return bool(text and _marked_answer(text))


def answer_part(response: str) -> str:
    """Return the text after the thinking: all of it without <think>, "" if the thinking never ends."""
    _, closed, after = response.rpartition("</think>")
    return "" if not closed and "<think>" in response else (after if closed else response).strip()


def gold_answer(answer: str) -> str:
    """Return the answer in a dataset's field: plain, boxed, or a GSM8K solution that ends in "#### 18" or "A: 18"."""
    if boxes := _boxes(answer)[0]:
        return boxes[-1]  # the whole list if there are several
    if "####" in answer:
        return answer.rpartition("####")[2].strip().partition("\n")[0].strip()
    if match := re.search(r"(?:\A|\n)(?:A|Answer):\s*(\S[^\n]*)\s*\Z", answer[-_TAIL:]):
        return match[1].strip()
    return answer.strip()


def _marked_answer(text: str) -> list[str]:
    """Return readings of an answer that is marked as one; empty if none is marked."""
    text = text[-_TAIL:]
    boxes, end = _boxes(text)
    markers = list(_MARKER.finditer(text, end))
    if boxes:
        is_final = markers and text[: markers[-1].start()].lower().endswith("final ")
        value = _value_at_start(text[markers[-1].end() :].lstrip(" \n*:")) if is_final else ""
        return [value] if value else boxes
    for line in reversed(list(_HASHES.finditer(text))):
        if not (_HEADING.match(line[1]) and text[line.end() :].strip()):
            return [line[1].strip()]
    if markers and (readings := _read_statement(text[markers[-1].end() :])):
        return readings
    bare = text.strip().strip("*").strip()
    return [bare] if bare and len(bare) <= _SPAN and not _PROSE.search(bare) else []


def _last_value(text: str) -> list[str]:
    text = text[-_TAIL:]
    formulas, numbers = list(_MATH.finditer(text)), list(_NUMBER.finditer(text))
    if formulas and (not numbers or numbers[-1].start() < formulas[-1].end()):
        return [_formula_text(formulas[-1])]
    return [numbers[-1][0]] if numbers else [text]


def _read_statement(text: str) -> list[str]:
    """Return readings of the text after "the answer is": a value, or a sentence that has one."""
    text = text.lstrip(" \t\n*:")[:_SPAN]
    formula = _MATH.match(text)  # a formula may span lines
    end = re.compile(r"\.(?:\s|\Z)|\n").search(text, formula.end() if formula else 0)
    line = text[: end.start() if end else None].strip().strip("*").strip()
    formulas = list(_MATH.finditer(line))
    if not _PROSE.search(line) and not formulas:
        return [line] if line else []
    if value := _value_at_start(line):
        return [value, *_joined_formulas(line, formulas), line]
    if verbs := list(_VERB.finditer(line)):  # Final answer: the largest n is 34.
        return _read_statement(line[verbs[-1].end() :])
    values = [_formula_text(m) for m in formulas] or _NUMBER.findall(line)
    return [line, *values[-1:]]


def _value_at_start(line: str) -> str:
    """Return the formula or number that `line` begins with, or an empty string."""
    match = _MATH.match(line)
    if match:
        return _formula_text(match)
    number = re.match(_NUMBER.pattern + r"(?=\s+[A-Za-z]{2,}|[.,;*]*\s|[.,;*]*\Z)", line)
    return number[0] if number else ""


def _joined_formulas(line: str, formulas: list[re.Match]) -> list[str]:
    """Join the leading formulas into one list if only "," or "and" is between them; empty if there is one formula."""
    end = 0
    while end < len(formulas) - 1 and _BETWEEN.fullmatch(line, formulas[end].end(), formulas[end + 1].start()):
        end += 1
    return [", ".join(_formula_text(m) for m in formulas[: end + 1])] if end else []


def _boxes(text: str) -> tuple[list[str], int]:
    """Return ([the last box's content, and its list if earlier boxes belong to it], end of the last box)."""
    found = boxes(text)
    if not found:
        return [], 0
    first = len(found) - 1
    while first and _BETWEEN.fullmatch(text, found[first - 1].end, found[first].start):
        first -= 1
    last = found[-1]
    joined = ", ".join(dict.fromkeys(box.content for box in found[first:]))
    return [last.content] + ([joined] if joined != last.content else []), last.end


def _formula_text(formula: re.Match) -> str:
    return next(g for g in formula.groups() if g)
