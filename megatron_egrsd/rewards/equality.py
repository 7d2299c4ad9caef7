"""Equality of two final answers: as text, as numbers, item by item, and last by algebra (verifier.py).

Most comparisons of a training run end after the first two steps ("42" and "42"). Every loop and pattern is bounded,
because an answer is any string that a policy can sample.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_egrsd.rewards.verifier import GaveUp, algebra_equal

_SPAN = 400  # characters beyond which an answer is compared as plain text
_DIGITS = 300  # digits and decimal exponents beyond which a number stays text
_ITEMS = 30  # items beyond which two lists are unequal
_ALGEBRA_ITEMS = 12  # items of one list that only algebra can match
_TOLERANCE = Fraction(2, 10**6)  # relative, if one of the two is a decimal: 1/3 and 0.333333

_SYMBOLS = str.maketrans(
    dict(zip("−–⁄÷，（）：\u202f\u00a0\u2009", "--//,():   ", strict=True))
    | {"×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "±": r"\pm "}
    | {"。": ".", "∪": r"\cup ", "∈": r"\in ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}"}
)
_WORDS = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|operatorname|mbox|rm)"
_NAME = r"(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?(?:\(\w+\))?|\((?:[a-zA-Z],)+[a-zA-Z]\))"  # x, x_1, f(x), \theta, (x,y)
_SPELLINGS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r",\s*\\!\s*|\{,\}", ","),  # a thousands separator
        (r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\?\$|\\[()]", ""),
        (r"\\%", "%"),
        (r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}"),
        (r"\\[lr]brace(?![a-zA-Z])", lambda m: r"\{" if "l" in m[0][:2] else r"\}"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\\[a-zA-Z]+|\w)\s*(\\[a-zA-Z]+|\w)", r"\\frac{\1}{\2}"),  # \frac12, \frac \pi4
        (r"\\(le|ge|ne)(?![a-zA-Z])", r"\\\1q"),
        (r"([<>!])=", lambda m: {"<": r"\leq ", ">": r"\geq ", "!": r"\neq "}[m[1]]),
        (r"\[(-\s*\\infty)", r"(\1"),
        (r"(\\infty\s*)\]", r"\1)"),
        (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree|\\deg(?![a-zA-Z]))", ""),
        # Units after a value; "5 \text{ or } 7" and "6 \text{ p.m.}" have no unit.
        (
            rf"(?<=[\d}})])\s*(?:{_WORDS}\s*\{{(?!\s*(?:and|or|[ap]\.?\s?m)\b)[^{{}}]*\}}(?:\^\{{?-?\d\}}?)?[\s/]*)+\Z",
            "",
        ),
        (rf"{_WORDS}\s*\{{([^{{}}]*)\}}", r" \1 "),
        (r"(?i)(?<![a-z])([ap])\.\s?m\b\.?", r"\1m"),
        (r"(?<=\d)\s*\^?\{?\s*(?:st|nd|rd|th)\b\s*\}?", ""),
        (rf"^{_NAME}\s*\\in(?![a-zA-Z])", ""),
        (r"(?<!\\)\{(\d{1,3}(?:,\d{3})+)\}", lambda m: "{" + m[1].replace(",", "") + "}"),  # \frac{20,000}{3}
    ]
]
_UNIT = re.compile(
    r"(-?[\d.,/ ]*\d(?:e[+-]?\d+)?%?\s?|.*(?:[\d})]|\\pi)\s)"  # 18 dollars, 5cm^2, \sqrt{3} square inches
    r"([A-Za-z]{2,}[A-Za-z .'/-]*(?:\^\{?\d\}?)?)"
)
_NOT_UNITS = {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "or", "and", "to", "mod", "am", "pm"}
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::00)?\s?([ap])?m?")
_BASED = re.compile(r"(-?[\d.a-f]*\d[\d.a-f]*)_\{?(\w+)\}?")
_MORE_THAN_A_LIST = re.compile(r"[<>]|\\(?:leq|geq|cup|cap|begin|in(?![a-z])|setminus)")


@lru_cache(maxsize=16384)
def equal(gold: str, answer: str) -> bool:
    """Return whether `answer` equals `gold`, the right answer. Takes a few seconds at most (verifier.CPU_SECONDS).

    Equal are: numbers of one value (a percentage has two: 50% is 50 and 0.5), lists and sets in any order, tuples and
    intervals in the same order, and expressions that algebra shows equal. Units, currency, degrees and "x =" before a
    value are ignored. A base (11_2) or the half of the day (3 PM) counts if both answers name it. Decimals agree to a
    relative 2e-6. Raises RunError if math-verify is missing.
    """
    if max(len(gold), len(answer)) > _SPAN:
        return gold.strip() == answer.strip() != ""
    try:
        return _equal(normalize(gold), normalize(answer))
    except (GaveUp, RecursionError):
        return False


def normalize(answer: str) -> str:
    """Rewrite an answer in one spelling: no math delimiters, typesetting, unit or currency; plain words lower-case."""
    s = answer.strip().strip("*").strip().translate(_SYMBOLS).rstrip(".,;").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if s.startswith(opening) and s.endswith(closing) and len(s) >= len(opening) + len(closing):
            s = s[len(opening) : -len(closing)].strip().rstrip(".,;").strip()
    for pattern, replacement in _SPELLINGS:
        s = pattern.sub(replacement, s)
    s = re.sub(r"\s+", " ", s).strip()
    if re.fullmatch(r"-?\d{1,3}(?:[, ] ?\d{3})+(?:\.\d+)?(?!\d)[^,\d]*", s):
        s = re.sub(r"(?<=\d)[, ] ?(?=\d{3}(?!\d))", "", s)
    unit = _UNIT.fullmatch(s)
    if unit and re.match("[A-Za-z]+", unit[2])[0].lower() not in _NOT_UNITS:
        s = unit[1].strip()
    if choice := re.fullmatch(r"\(?([A-Za-z])\)?", s):
        return choice[1].lower()
    if "\\" not in s:
        s = s.lower()
    if re.search(r"[a-z\\]", s):  # in an expression 2/3 x is a fraction before x; alone it may be part of 1 2/3
        s = re.sub(r"(?<![\w.^_{}/])(?<!sqrt )(\d+)/(\d+)(?![a-hj-zA-Z\d_./({^])", r"\\frac{\1}{\2}", s)
    # Spaces have a meaning between words and letters, and in 1 2/3.
    return re.sub(r"(?<![a-zA-Z]) (?!\d+/\d)| (?![a-zA-Z\d])", "", s).rstrip(".")


def number(text: str) -> Fraction | None:
    """Return the value of a normalised number (decimal, scientific, fraction, mixed fraction), else None."""
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


def _equal(gold: str, answer: str) -> bool:
    """Compare normalised answers: the first comparison that does not return None decides."""
    if not gold or not answer:
        return False
    if gold == answer:
        return True
    for compare in (_numbers, _choices, _clocks, _bases, _lists, _words, _equations, _ratios):
        if (verdict := compare(gold, answer)) is not None:
            return verdict
    return algebra_equal(gold, answer)


def _numbers(gold: str, answer: str) -> bool | None:
    x, y = number(gold), number(answer)
    if x is None or y is None:
        return None
    exact = not any("." in s or "e" in s for s in (gold, answer))
    return any(
        u == v or (not exact and abs(u - v) <= _TOLERANCE * max(abs(u), abs(v)))
        for u in ({x, x / 100} if "%" in gold else {x})
        for v in ({y, y / 100} if "%" in answer else {y})
    )


def _choices(gold: str, answer: str) -> bool | None:
    """Compare a choice with a choice that is followed by its text: C and (C) 5."""
    named = re.match(r"\(?([a-jA-J])(?:\)|[.:])(?=.)", answer)
    return named[1].lower() == gold if named and re.fullmatch("[a-j]", gold) else None


def _clocks(gold: str, answer: str) -> bool | None:
    times = [_CLOCK.fullmatch(s) for s in (gold, answer)]
    if not all(times) or not all(m[2] or m[3] for m in times):
        return None
    (hour, minute, half), (other_hour, other_minute, other_half) = (
        (int(m[1]), m[2] or "00", m[3] or ("p" if int(m[1]) > 12 else "")) for m in times
    )
    same_half = half == other_half or not (half and other_half)
    return same_half and minute == other_minute and hour % 12 == other_hour % 12


def _bases(gold: str, answer: str) -> bool | None:
    """Compare numerals with a base: the digits must agree, and the base if both name it."""
    a, b = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if a and b:
        return a.groups() == b.groups()
    if a or b:
        digits, other = (a[1], answer) if a else (b[1], gold)
        return digits == other if number(other) is not None else None
    return None


def _lists(gold: str, answer: str) -> bool | None:
    """Compare tuples and intervals item by item, sets and bare lists in any order; None if neither answer is one."""
    if _MORE_THAN_A_LIST.search(gold + answer):
        return None
    (opening, closing, wanted), (other_opening, other_closing, given) = _items(gold), _items(answer)
    if any(len(items) == 1 and "=" in items[0] for items in (wanted, given)):
        return None
    if len(wanted) == len(given) == 1:
        return _equal(wanted[0], given[0]) if "{" in (opening, other_opening) else None
    if len(wanted) != len(given) or len(wanted) > _ITEMS:
        return False
    if not (_all_named(wanted) and _all_named(given)):  # x=1, y=2 is also (1, 2)
        wanted, given = _without_names(wanted), _without_names(given)
    delimiters = {opening + closing, other_opening + other_closing}
    if delimiters <= {"{}", ""}:
        return _same_in_any_order(wanted, given)
    if len(delimiters) == 1 or delimiters == {"()", ""}:
        return all(_equal(w, g) for w, g in zip(wanted, given, strict=True))
    return False


def _all_named(items: list[str]) -> bool:
    return all(re.match(rf"{_NAME}=", item) for item in items)


def _without_names(items: list[str]) -> list[str]:
    """Return the values of x=1, y=2, in the order of the names if all items have one."""
    ordered = sorted(items, key=lambda item: item.partition("=")[0]) if _all_named(items) else items
    return [re.sub(rf"^{_NAME}=", "", item) for item in ordered]


def _same_in_any_order(wanted: list[str], given: list[str]) -> bool:
    left, hard = list(given), []
    for item in wanted:
        match = next((c for c in left if item == c or _numbers(item, c)), None)
        if match is None:
            hard.append(item)
        else:
            left.remove(match)
    if len(hard) > _ALGEBRA_ITEMS:
        return False
    for item in hard:
        match = next((c for c in left if _names_match(item, c) and _equal(item, c)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _names_match(item: str, candidate: str) -> bool:
    """Return False if the two items have different names (x=1, y=1)."""
    names = [re.match(rf"({_NAME})=", s) for s in (item, candidate)]
    return not all(names) or names[0][1] == names[1][1]


def _items(s: str) -> tuple[str, str, list[str]]:
    """Return opening and closing delimiter (empty for a bare list) and the items; a \\pm b counts as two items."""
    s = s.replace(r"\{", "{").replace(r"\}", "}")
    opening = closing = ""
    if s[:1] in ("(", "[", "{") and s[-1:] in (")", "]", "}") and _closes_at_the_end(s):
        opening, closing, s = s[0], s[-1], s[1:-1]
    items, depth, start = [], 0, 0
    for m in re.finditer(r"[(\[{]|[)\]}]|[,;]|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", s):
        if m[0] in "([{":
            depth += 1
        elif m[0] in ")]}":
            depth -= 1
        elif depth == 0:
            items.append(s[start : m.start()])
            start = m.end()
    items = [item.strip() for item in [*items, s[start:]] if item.strip()]
    if len(items) == 1 and opening in ("(", "["):  # the brackets belong to an expression
        opening = closing = ""
        items = [s]
    if opening != "(":
        items = [t.strip("+") for item in items for t in ([item] if item.count(r"\pm") != 1 else _both_signs(item))]
    return opening, closing, list(dict.fromkeys(items)) if opening != "(" else items


def _both_signs(item: str) -> list[str]:
    return [item.replace(r"\pm", "+"), item.replace(r"\pm", "-")]


def _closes_at_the_end(s: str) -> bool:
    """Return whether the bracket that opens `s` is closed by its last character."""
    depth = 0
    for i, c in enumerate(s):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(s) - 1
    return False


def _words(gold: str, answer: str) -> bool | None:
    word = re.compile(r"[a-z' -]{3,}")
    return False if word.fullmatch(gold) and word.fullmatch(answer) else None


def _equations(gold: str, answer: str) -> bool | None:
    """Compare an equation with a value: x=5 is 5, m+n=16 is 16, but 2x=5 is not 5. None for two equations."""
    head, approximately, tail = answer.partition(r"\approx")
    if approximately:
        return _equal(gold, tail if re.fullmatch(_NAME, head) else head)
    (name, gold_is, value), (left, answer_is, right) = gold.rpartition("="), answer.rpartition("=")
    if not gold_is and not answer_is:
        return None
    if gold_is and answer_is:
        plain = re.fullmatch(_NAME, name) and re.fullmatch(_NAME, left)
        return _equal(value, right) if plain else None
    if gold_is:
        return bool(re.fullmatch(_NAME, name) or not re.search(r"[-+*^=]|^\d", name)) and _equal(value, answer)
    variables = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", left)
    return (len(variables) != 1 or bool(re.match(rf"{_NAME}(?:=|\Z)", left))) and _equal(gold, right)


def _ratios(gold: str, answer: str) -> bool | None:
    if ":" not in gold + answer:
        return None
    parts, others = gold.split(":"), answer.split(":")
    return len(parts) == len(others) <= _ITEMS and all(map(_equal, parts, others))
