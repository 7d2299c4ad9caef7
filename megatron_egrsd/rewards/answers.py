"""Extraction of the final answer from a response and from a dataset's field (equality.py compares the two).

Every loop and pattern is bounded, because a response is any string that a policy can sample.
"""

import re

from megatron_egrsd.data.boxes import boxes, is_form
from megatron_egrsd.rewards.languages import CHOOSE, LETTERS, MARKER, SENTENCE_END, is_sentence, plain
from megatron_egrsd.rewards.quantities import CURRENCY, SCALE

THINKING = ("<think>", "</think>")
_TAIL = 20_000  # characters at the end of a text that are searched for an answer
_SPAN = 400  # characters behind "the answer is" that are searched for an answer

_LETTER = r"(?-i:[A-J])(?![A-Za-z])"  # of a choice
_MARKER = re.compile(
    r"(?<!to )\banswer\b[^.\n:=]{0,60}?(?:\bis\b|\bare\b|\bbe\b|[:=])[:\s]*"  # the answer is, final answer:, answer =
    r"|^\W{0,4}A:\s"  # A: 18
    r"|^[#*\s]{0,6}(?:the )?(?:final )?answer[*\s]{0,6}\n"  # a heading
    # the correct option is A
    rf"|\b(?:option|choice)s?\b[^.\n:=]{{0,30}}?(?:\bis\b|[:=])\s*(?=[*(\\]{{0,4}}{_LETTER})"
    rf"|\b(?:so|hence|thus|therefore|choose|select|pick) (?:the )?(?:option|choice) (?=[*(]{{0,4}}{_LETTER})"
    rf"|\b(?:option|choice) (?=\(?{_LETTER}\)? is (?:correct|right)\b)"
    rf"|(?<!\w)(?=\(?{_LETTER}\)? is (?:the )?(?:correct|right) (?:answer|option|choice)\b)"
    rf"|{CHOOSE}(?=[*(]{{0,3}}{_LETTER})"
    rf"|{MARKER}",
    re.IGNORECASE | re.MULTILINE,
)
_TAGGED = re.compile(r"<(?:final[_ ]?)?answer>(.{0,2000}?)(?:</(?:final[_ ]?)?answer>|\Z)", re.IGNORECASE | re.DOTALL)
_CHOSEN = re.compile(
    r"(?:(?:the )?(?:option|choice|选项|選項|вариант|opción) ?)?(?:\\text(?:bf)?\{)?"
    rf"[*(\[]{{0,3}}({_LETTER})[)\]*}}]{{0,4}}"
    r"(?!\s*(?:,|and|or|&|/)\s*\(?(?-i:[A-J])\b)"  # one choice of several
    r"(?=\s*(?:[.,;:!]|\Z|\n|[^\x00-\x7f])|\s+(?:because|since|as|is|which|\$|-?\d))",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####[ \t]*([^\s#][^\n]*)")
_HEADING = re.compile(r"\d+\.\s+[A-Z]|[A-Z][a-z]{2,}")  # "#### Step 3" with text below it is no answer
_MATH = re.compile(
    r"\$\$(.{1,2000}?)\$\$|(?<!\\)\$(.{1,2000}?)(?<!\\)\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    rf"-?(?:(?:\\?\$|[{CURRENCY}]|\bRs\.?)\s?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    r"(?:/\d+|e[+-]?\d+|\s?(?:\\times|\\cdot|[x×*])\s?10\^\{?[+-]?\d+\}?)?(?:\s?\\?%)?"
    rf"(?i:{SCALE})?"
)
_STARTING_NUMBER = re.compile(
    rf"{_NUMBER.pattern}(?=\s+[A-Za-z]{{2,}}|[.,;*]*\s|[.,;*]*\Z|[.,;*\s]*[{LETTERS}。、]|\s?(?:°|\^\\circ)|</)"
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}[\s,]|\n")  # a word that is not a LaTeX command
_DENIED = re.compile(r"not\b(?:.{0,80}?\bbut\b(?: rather)?(\s+))?", re.IGNORECASE)  # the answer is not 4; not 4 but 5
_VERB = re.compile(r"(?<![\\A-Za-z])(?:is|are|equals|be)\b:?\s*")
_BETWEEN = re.compile(  # text allowed between the parts of one list
    r"(?:[\s,;.$&]|\\[()\]\[]|\\q?quad\b|\\text ?\{ {0,9}(?:and|or)? {0,9}\}|\b(?:and|or)\b"
    r"|[a-zA-Z](?:_\{?\d\}?)?\s*=)*"
)


def final_answer(response: str) -> list[str]:
    """Return readings of a response's final answer, best first; empty if it has none.

    Only the part after the last </think> counts; a response whose thinking never ends has no answer. In this part the
    last \\boxed{} wins, unless <answer> follows, or "the answer is" with a value right behind it. Then <answer>, then
    "####", then "the answer is" or "A:" in any of the languages of languages.py, then the last formula or number. A
    second reading is added if boxes or formulas may be one list, if a number is part of a sentence, or if a choice has
    a text.
    """
    text = answer_part(response)
    return (_marked_answer(text) or _last_value(text)) if text else []


def states_answer(response: str) -> bool:
    """Return whether the response marks its answer: a box, "####", "the answer is", "A:", or nothing but an answer."""
    text = answer_part(response)
    return bool(text and _marked_answer(text))


def answer_part(response: str) -> str:
    """Return the text after the thinking: all of it without <think>, "" if the thinking never ends."""
    opening, closing = THINKING
    _, closed, after = response.rpartition(closing)
    part = after if closed else response
    return "" if opening in part else plain(part).strip()


def gold_answer(answer: str) -> str:
    """Return the answer in a dataset's field: plain, boxed, or a GSM8K solution that ends in "#### 18" or "A: 18"."""
    answer = plain(answer)
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
    tagged = [m for m in _TAGGED.finditer(text) if m.end() >= end and m[1].strip() and not is_form(m[1])]
    if tagged:
        inner = tagged[-1][1].strip()
        return _marked_answer(inner) or _read_statement(inner) or [inner]
    markers = list(_MARKER.finditer(text, end))
    if boxes:
        stated = (_values_at_start(_statement(text, marker)) for marker in reversed(markers))
        return next(filter(None, stated), boxes)
    for line in reversed(list(_HASHES.finditer(text))):
        if not (_HEADING.match(line[1]) and text[line.end() :].strip()):
            return [line[1].strip()]
    if markers and (readings := _read_statement(_statement(text, markers[-1]))):
        return readings
    bare = text.strip().strip("*").strip()
    return [bare] if bare and len(bare) <= _SPAN and not _is_prose(bare) else []


def _is_prose(text: str) -> bool:
    return bool(_PROSE.search(text)) or is_sentence(text)


def _statement(text: str, marker: re.Match) -> str:
    """Return the text behind a marker of an answer."""
    return text[marker.end() : marker.end() + 2 * _SPAN].lstrip(" \t\n*:")[:_SPAN]


def _last_value(text: str) -> list[str]:
    text = text[-_TAIL:]
    bare = _without_scripts(text)
    formulas, numbers = list(_MATH.finditer(bare)), list(_NUMBER.finditer(bare))
    if formulas and (not numbers or numbers[-1].start() < formulas[-1].end()):
        return [_formula_text(formulas[-1])]
    if not numbers:
        return [text]
    script = _MATH.match(text, numbers[-1].end())  # 10$^5$; after a unit (12.5 cm$^2$) it belongs to that
    return [numbers[-1][0] + (_formula_text(script).strip() if script and _is_script(script) else "")]


def _without_scripts(text: str) -> str:
    """Return `text` with blanks in place of formulas that only raise or lower: they are no value of their own."""
    return _MATH.sub(lambda formula: " " * len(formula[0]) if _is_script(formula) else formula[0], text)


def _is_script(formula: re.Match) -> bool:
    return _formula_text(formula).lstrip()[:1] in ("^", "_")


def _read_statement(text: str) -> list[str]:
    """Return readings of the text after "the answer is": a value, or a sentence that has one."""
    line, formulas = _first_sentence(text)
    if denied := _DENIED.match(line):
        return _read_statement(line[denied.end() :]) if denied[1] else [line]
    if not _is_prose(line) and not formulas and not _CHOSEN.match(line):
        return [line] if line else []
    if values := _values_at_start(text):
        return values
    if verbs := list(_VERB.finditer(line)):  # Final answer: the largest n is 34.
        return _read_statement(line[verbs[-1].end() :].lstrip(" \t\n*:"))
    bare = _without_scripts(line)
    values = [_formula_text(m) for m in _MATH.finditer(bare)] or _NUMBER.findall(bare)
    return [line, *values[-1:]]


def _first_sentence(text: str) -> tuple[str, list[re.Match]]:
    """Return the first sentence, which ends with its line, and the formulas in it."""
    formula = _MATH.match(text)  # a formula may span lines
    end = SENTENCE_END.search(text, formula.end() if formula else 0)
    line = text[: end.start() if end else None].strip().strip("*").strip()
    return line, list(_MATH.finditer(line))


def _values_at_start(text: str) -> list[str]:
    """Return readings of a statement that begins with a formula, a number or the letter of a choice; else []."""
    line, formulas = _first_sentence(text)
    if chosen := _CHOSEN.match(text):
        return [chosen[1], text.partition("\n")[0].strip()]
    if _MATH.match(line):
        return [_formula_text(formulas[0]), *_joined_formulas(line, formulas), line]
    number = _STARTING_NUMBER.match(line)
    return [number[0], line] if number else []


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
