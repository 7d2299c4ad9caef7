"""Where the final answer stands in a response, and in a dataset's field (equality.py compares the two).

Every loop and pattern is bounded, because a response is any string that a policy can sample.
"""

import re

_TAIL = 20_000  # characters of the end of a text that are searched for an answer
_SPAN = 400  # characters in which an answer is looked for behind "the answer is"

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
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}[\s,]|\n")  # a word that is no LaTeX command
_VERB = re.compile(r"(?<![\\A-Za-z])(?:is|are|equals|be)\b:?\s*")
_BETWEEN = re.compile(  # what may stand between the parts of one list
    r"(?:[\s,;.$&]|\\[()\]\[]|\\q?quad\b|\\text ?\{ {0,9}(?:and|or)? {0,9}\}|\b(?:and|or)\b"
    r"|[a-zA-Z](?:_\{?\d\}?)?\s*=)*"
)


def final_answer(response: str) -> list[str]:
    """Readings of the answer that a response ends on, best first; empty where it gives none.

    Only the part after the last </think> counts, and thinking that never ends gives no answer: a response that
    never came out of its thoughts has not answered. In what remains the last \\boxed{} wins (unless "the final
    answer is" stands behind it), then "####", then "the answer is" or "A:", then the last formula or number. There
    is a second reading where boxes or formulas may be one list, and where a number stands in a sentence.
    """
    text = answer_part(response)
    return (_stated(text) or _last_value(text)) if text else []


def states_answer(response: str) -> bool:
    """Whether the response marks its final answer: a box, "####", "the answer is", "A:", or nothing but an answer."""
    text = answer_part(response)
    return bool(text and _stated(text))


def answer_part(response: str) -> str:
    """What a response says after its thinking: all of it without <think>, nothing where the thinking never ends."""
    _, closed, after = response.rpartition("</think>")
    return "" if not closed and "<think>" in response else (after if closed else response).strip()


def gold_answer(answer: str) -> str:
    """The answer in a dataset's field: plain, boxed, or a GSM8K solution that ends in "#### 18" or "A: 18"."""
    if boxes := _boxes(answer)[0]:
        return boxes[-1]  # the whole list where there are several
    if "####" in answer:
        return answer.rpartition("####")[2].strip().partition("\n")[0].strip()
    if match := re.search(r"(?:\A|\n)(?:A|Answer):\s*(\S[^\n]*)\s*\Z", answer[-_TAIL:]):
        return match[1].strip()
    return answer.strip()


def _stated(text: str) -> list[str]:
    """Readings of an answer that is marked as one."""
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
    if markers and (readings := _statement(text[markers[-1].end() :])):
        return readings
    bare = text.strip().strip("*").strip()
    return [bare] if bare and len(bare) <= _SPAN and not _PROSE.search(bare) else []


def _last_value(text: str) -> list[str]:
    text = text[-_TAIL:]
    formulas, numbers = list(_MATH.finditer(text)), list(_NUMBER.finditer(text))
    if formulas and (not numbers or numbers[-1].start() < formulas[-1].end()):
        return [_inside(formulas[-1])]
    return [numbers[-1][0]] if numbers else [text]


def _statement(text: str) -> list[str]:
    """Readings of what follows "the answer is": a value, or a sentence that has one."""
    text = text.lstrip(" \t\n*:")[:_SPAN]
    formula = _MATH.match(text)  # which may span lines
    end = re.compile(r"\.(?:\s|\Z)|\n").search(text, formula.end() if formula else 0)
    line = text[: end.start() if end else None].strip().strip("*").strip()
    formulas = list(_MATH.finditer(line))
    if not _PROSE.search(line) and not formulas:
        return [line] if line else []
    if value := _value_at_start(line):
        return [value, *_as_list(line, formulas), line]
    if verbs := list(_VERB.finditer(line)):  # Final answer: the largest n is 34.
        return _statement(line[verbs[-1].end() :])
    values = [_inside(m) for m in formulas] or _NUMBER.findall(line)
    return [line, *values[-1:]]


def _value_at_start(line: str) -> str:
    """The formula or number that `line` begins with, or an empty string."""
    match = _MATH.match(line)
    if match:
        return _inside(match)
    number = re.match(_NUMBER.pattern + r"(?=\s+[A-Za-z]{2,}|[.,;*]*\s|[.,;*]*\Z)", line)
    return number[0] if number else ""


def _as_list(line: str, formulas: list[re.Match]) -> list[str]:
    """The formulas from the first on, as one list, where nothing but "," or "and" stands between them."""
    end = 0
    while end < len(formulas) - 1 and _BETWEEN.fullmatch(line, formulas[end].end(), formulas[end + 1].start()):
        end += 1
    return [", ".join(_inside(m) for m in formulas[: end + 1])] if end else []


def _boxes(text: str) -> tuple[list[str], int]:
    """The last box's content and, where boxes before it belong to the same list, that list; and where it ends."""
    spans: list[tuple[int, int, str]] = []
    for match in list(re.finditer(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?= ?[\w$]))", text))[-20:]:
        start = match.end()
        if not match[0].endswith("{"):  # \boxed 5
            content = re.match(r"[^\s$]{1,20}", text[start:])
            spans += [(match.start(), start + content.end(), content[0])] if content else []
            continue
        depth, end = 1, start
        while end < len(text) and depth:
            if text[end] == "\\":
                end += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth and (not spans or match.start() >= spans[-1][1]):  # a box in a box belongs to the outer
            spans.append((match.start(), end, text[start : end - 1].strip()))
    spans = [s for s in spans if s[2]]
    if not spans:
        return [], 0
    first = len(spans) - 1
    while first and _BETWEEN.fullmatch(text, spans[first - 1][1], spans[first][0]):
        first -= 1
    joined = ", ".join(dict.fromkeys(s[2] for s in spans[first:]))
    return [spans[-1][2]] + ([joined] if joined != spans[-1][2] else []), spans[-1][1]


def _inside(formula: re.Match) -> str:
    return next(g for g in formula.groups() if g)
