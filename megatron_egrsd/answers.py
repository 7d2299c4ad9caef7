"""Final answers in text: where they stand, and whether two of them are plainly the same. Text only, no algebra.

Most comparisons of a training run end here ("42" and "42"); what is left goes to math-verify (verifier.py). Every
loop and pattern is bounded, because a response is any string that a policy can sample.
"""

import re
from fractions import Fraction

_TAIL = 20_000  # characters of the end of a text that are searched for an answer
_SPAN = 400  # characters beyond which an answer is not compared at all
_DIGITS = 300  # digits and decimal exponents beyond which a number stays text

_MARKER = re.compile(
    r"\banswer\b[^.\n:=]{0,60}?(?:\bis\b|\bare\b|\bbe\b|[:=])[:\s]*"  # the answer is, final answer:, answer =
    r"|^\W{0,4}A\s?[:.]\s"  # A: 18
    r"|^#{1,4}\s?(?:final )?answer\W{0,4}\n",  # a heading
    re.IGNORECASE | re.MULTILINE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(
    r"-?(?:\\?\$\s?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    r"(?:/\d+|e[+-]?\d+|\s?(?:\\times|\\cdot|[x×*])\s?10\^\{?[+-]?\d+\}?)?(?:\s?\\?%)?"
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}\s|\n")  # a word that is no LaTeX command
_BETWEEN_BOXES = re.compile(r"[\s,;.$&]*(?:(?:\\text\{\s*)?(?:and|or)\s*\}?)?[\s,;$]*\Z")
_NOT_UNITS = {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "or", "and", "to", "mod", "e", "i", "x"}


def final_answer(response: str) -> list[str]:
    """Readings of the answer that a response ends on, best first; empty where it gives none.

    Only the part after the last </think> counts, and thinking that never ends gives no answer: a response that
    never came out of its thoughts has not answered. In what remains the last \\boxed{} wins, then "####", then
    "the answer is" or "A:", then the last formula or number. Boxes joined by nothing but a comma, "and" or "or"
    are also read as one list, for answers that are lists.
    """
    _, closed, after = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return []
    text = (after if closed else response)[-_TAIL:]
    if boxes := _boxes(text):
        return boxes
    if "####" in text:
        return [_first_line(text.rpartition("####")[2])]
    matches = list(_MARKER.finditer(text))
    if matches and (tail := _statement(text[matches[-1].end() :])):
        return [tail]
    stripped = text.strip().strip("*").strip()
    if not _PROSE.search(stripped) and len(stripped) <= _SPAN:
        return [stripped] if stripped else []
    formulas, numbers = list(_MATH.finditer(text)), list(_NUMBER.finditer(text))
    if formulas and (not numbers or numbers[-1].start() < formulas[-1].end()):
        return [_inside(formulas[-1])]
    return [numbers[-1][0] if numbers else stripped]


def gold_answer(answer: str) -> str:
    """The answer in a dataset's field: a GSM8K solution ("... #### 18"), a boxed solution or the plain answer."""
    if boxes := _boxes(answer):
        return boxes[-1]  # the whole list where there are several
    if "####" in answer:
        return _first_line(answer.rpartition("####")[2])
    return answer.strip()


def same_text(a: str, b: str) -> bool | None:
    """True or False where text and number arithmetic can tell; None where it takes algebra.

    Numbers with a decimal point agree to a relative 2e-6 (1/3 and 0.333333). A percentage agrees with its number
    and with its value: 50% with 50 and with 0.5.
    """
    if len(a) > _SPAN or len(b) > _SPAN or not a.strip() or not b.strip():
        return a.strip() == b.strip() != ""
    left, right = normalize(a), normalize(b)
    if left == right:
        return bool(left)
    x, y = number(left), number(right)
    if x is None or y is None:
        words = re.compile(r"[a-z ]{3,}")
        return False if words.fullmatch(left) and words.fullmatch(right) else None
    percents = [{x, x / 100} if "%" in left else {x}, {y, y / 100} if "%" in right else {y}]
    exact = not any("." in s or "e" in s for s in (left, right))
    return any(
        u == v or (not exact and abs(u - v) <= Fraction(2, 10**6) * max(abs(u), abs(v)))
        for u in percents[0]
        for v in percents[1]
    )


def normalize(answer: str) -> str:
    """One spelling of an answer: no math delimiters, typesetting, unit, currency or name of the unknown."""
    s = answer.strip().strip("*").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if s.startswith(opening) and s.endswith(closing) and len(s) >= len(opening) + len(closing):
            s = s[len(opening) : -len(closing)].strip()
    s = s.rstrip(".,;").strip()
    s = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![a-zA-Z])", "", s)
    s = re.sub(r"\\[,;:!]|\\ |~|\u202f|\u00a0|\\quad", " ", s).replace("\\$", "").replace("\\%", "%")
    s = s.replace("{,}", ",").replace("−", "-").replace("–", "-").replace("$", "").replace("^{\\prime", "^{'")
    s = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", s)
    s = re.sub(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree|\\deg\b)", "", s)
    s = re.sub(r"(?<=[\d}])\s*\\(?:text|mathrm|textrm|operatorname|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\Z", "", s)
    s = re.sub(r"\\(?:text|mathrm|textrm|textbf|mathbf|operatorname|mbox)\s*\{([^{}]*)\}", r"\1", s).strip()
    s = re.sub(r"^[a-zA-Z](?:\([a-zA-Z]\)|_\{?\w\}?)?\s*(?:=|\\in(?![a-zA-Z]))\s*(?=[^=]*\Z)", "", s)
    s = re.sub(r"\\le(?![a-z])", r"\\leq", re.sub(r"\\ge(?![a-z])", r"\\geq", s))
    if re.fullmatch(r"-?\d{1,3}(?:[, ]\s?\d{3})+(?:\.\d+)?\D*", s):
        s = re.sub(r"(?<=\d)[, ]\s?(?=\d{3}(?!\d))", "", s)
    s = _without_unit(s)
    if choice := re.fullmatch(r"\(?([A-Za-z])\)?", s):
        return choice[1].lower()
    s = re.sub(r"\s+", " ", s).strip().rstrip(".").lower()
    # Spaces carry meaning only between words.
    return s if re.fullmatch(r"[a-z][a-z' -]+[a-z]", s) else s.replace(" ", "") if "/" not in s else s


def number(text: str) -> Fraction | None:
    """The value of a normalised number: decimal, scientific, fraction, mixed fraction; None for all else."""
    s = text.rstrip("%").strip().replace("\\cdot", "\\times")
    if len(s) > _DIGITS:
        return None
    sign = -1 if s.startswith("-") else 1
    s = s.lstrip("+-").strip() if s[:1] in "+-" else s
    decimal = r"(\d+\.?\d*|\.\d+)"
    if m := re.fullmatch(decimal + r"(?:\s*(?:e|\\times\s*10\^|[x*×]\s*10\^)\{?([+-]?\d+)\}?)?", s):
        exponent = int(m[2][:6]) if m[2] else 0
        return sign * Fraction(m[1]) * Fraction(10) ** exponent if abs(exponent) <= _DIGITS else None
    if m := re.fullmatch(r"10\^\{?([+-]?\d{1,3})\}?", s):
        return sign * Fraction(10) ** int(m[1]) if abs(int(m[1])) <= _DIGITS else None
    fraction = r"(?:\\frac(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))|(\d+)\s?/\s?(\d+))"
    if m := re.fullmatch(r"(\d+ ?(?=\\)|\d+ (?=\d))?\s*" + fraction, s):
        top, bottom = Fraction(m[2] or m[3] or m[6]), Fraction(m[4] or m[5] or m[7])
        return sign * (Fraction((m[1] or "0").strip()) + top / bottom) if bottom else None
    return None


def _without_unit(s: str) -> str:
    """A number followed by words (18 dollars, 5 cm^2, 3 hours a day) without them; 2 pi and 3 x keep theirs."""
    m = re.fullmatch(r"(-?[\d.,/]*\d(?:e[+-]?\d+)?%?)\s?([A-Za-z][A-Za-z .'/-]*(?:\^\{?\d\}?)?)", s)
    words = re.findall(r"[A-Za-z]+", m[2]) if m else []
    if m and len(words[0]) > 1 and not _NOT_UNITS & {w.lower() for w in words[:1]}:
        return m[1]
    return s


def _boxes(text: str) -> list[str]:
    """The last box's content and, where boxes before it belong to the same list, the whole list."""
    spans: list[tuple[int, int, str]] = []
    for match in list(re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(?= ?[\w$]))", text))[-20:]:
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
        return []
    first = len(spans) - 1
    while first and _BETWEEN_BOXES.match(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    joined = ", ".join(dict.fromkeys(s[2] for s in spans[first:]))
    return [spans[-1][2]] + ([joined] if joined != spans[-1][2] else [])


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _statement(text: str) -> str:
    """The answer at the start of what follows "the answer is": one formula, or one number, or the whole sentence."""
    line = re.split(r"\.(?:\s|\Z)|\n", text.lstrip(" \t\n*:")[:_SPAN], maxsplit=1)[0].strip().strip("*").strip()
    if formulas := [_inside(m) for m in _MATH.finditer(line)]:
        return ", ".join(formulas)
    if not _PROSE.search(line):
        return line
    if m := re.match(_NUMBER.pattern + r"(?=\s[A-Za-z]{2,})", line):
        return m[0]
    numbers = _NUMBER.findall(line)
    return numbers[0] if len(numbers) == 1 and "\\" not in line else line


def _inside(formula: re.Match) -> str:
    return next(g for g in formula.groups() if g)
