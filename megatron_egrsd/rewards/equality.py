"""Equality of two final answers: as text, as numbers, item by item, and last by algebra (verifier.py).

Most comparisons of a training run end after the first two steps ("42" and "42"). Every loop and pattern is bounded,
because an answer is any string that a policy can sample.
"""

import re
from fractions import Fraction
from functools import lru_cache

from megatron_egrsd.rewards.normal_form import NAME, normalize, number, without_separators
from megatron_egrsd.rewards.quantities import other_quantity
from megatron_egrsd.rewards.verifier import GaveUp, algebra_equal

_SPAN = 400  # characters beyond which an answer is compared as plain text
_ITEMS = 30  # items beyond which two lists are unequal
_ALGEBRA_ITEMS = 12  # items of one list that only algebra can match
_TOLERANCE = Fraction(2, 10**6)  # relative, if one of the two is a decimal: 1/3 and 0.333333

_CHOICE = re.compile(  # (C) 27, \textbf{(A)}\ 12, C. 27
    r"\s*\$?(?:\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s?\{\s?|\*\*)?"
    r"(?:\((?P<letter>[A-J])\)|(?P<bare>[A-J])[.)])(?:\s|\\ |~|\}|\*\*){1,6}\$?\s?(?P<text>[\w$\\.\-\"'“(].*)",
    re.DOTALL,
)
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
    if (verdict := other_quantity(gold, answer)) is not None:
        return verdict
    try:
        verdict = _choices_with_texts(gold, answer)
        return _same(gold, answer) if verdict is None else verdict
    except (GaveUp, RecursionError):
        return False


def _same(gold: str, answer: str) -> bool:
    """Normalise and compare, then without thousands separators: 60,120 may be 60, 120, and 10, 000 be 10,000."""
    wanted, given = normalize(gold), normalize(answer)
    whole = without_separators(wanted), without_separators(given)
    return _equal(wanted, given) or (whole != (wanted, given) and _equal(*whole))


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
    alone = ("%" in gold) != ("%" in answer)  # beside a plain number 50 % is 50 or 0.5, but it is not 0.5 %
    return any(
        u == v or (not exact and abs(u - v) <= _TOLERANCE * max(abs(u), abs(v)))
        for u in ({x, x / 100} if alone and "%" in gold else {x})
        for v in ({y, y / 100} if alone and "%" in answer else {y})
    )


def _choices(gold: str, answer: str) -> bool | None:
    """Compare a choice with a choice that is followed by its text: C and (C) 5."""
    named = re.match(r"\(?([a-jA-J])(?:\)|[.:])(?=.)", answer)
    return named[1].lower() == gold if named and re.fullmatch("[a-j]", gold) else None


def _choices_with_texts(gold: str, answer: str) -> bool | None:
    """Compare a choice that has a text, (C) 27, with another one, with a lone letter, or with a lone text."""
    named, given = _CHOICE.fullmatch(gold), _CHOICE.fullmatch(answer)
    if not named and not given:
        return None
    letter, text = (_letter(named), _text_of(named)) if named else ("", gold)
    other_letter, other_text = (_letter(given), _text_of(given)) if given else ("", answer)
    if named and given:
        return letter == other_letter and _same(text, other_text)
    lone = normalize(other_text if named else text)
    if re.fullmatch("[a-j]", lone):
        return lone == (letter or other_letter).lower()
    return _same(text, other_text) or _same(gold, answer)


def _letter(choice: re.Match) -> str:
    return choice["letter"] or choice["bare"]


def _text_of(choice: re.Match) -> str:
    text = choice["text"]
    return text[:-1] if text.endswith("}") and text.count("{") < text.count("}") else text


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
    return all(re.match(rf"{NAME}=", item) for item in items)


def _without_names(items: list[str]) -> list[str]:
    """Return the values of x=1, y=2, in the order of the names if all items have one."""
    ordered = sorted(items, key=lambda item: item.partition("=")[0]) if _all_named(items) else items
    return [re.sub(rf"^{NAME}=", "", item) for item in ordered]


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
    names = [re.match(rf"({NAME})=", s) for s in (item, candidate)]
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
        both = [[s.replace(r"\pm", sign) for sign in "+-"] if s.count(r"\pm") == 1 else [s] for s in items]
        items = [value.strip("+") for values in both for value in values]
    return opening, closing, list(dict.fromkeys(items)) if opening != "(" else items


def _closes_at_the_end(s: str) -> bool:
    """Return whether the bracket that opens `s` is closed by its last character."""
    depth = 0
    for i, c in enumerate(s):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(s) - 1
    return False


def _words(gold: str, answer: str) -> bool | None:
    if not all(re.fullmatch(r"[a-z' -]{3,}", text) for text in (gold, answer)):
        return None
    singular, other = (re.sub(r"^the |(?<=[a-z]{3})s$", "", text) for text in (gold, answer))
    return singular == other


def _equations(gold: str, answer: str) -> bool | None:
    """Compare an equation with a value: x=5 is 5, m+n=16 is 16, but 2x=5 is not 5. None for two equations."""
    for one, other in ((answer, gold), (gold, answer)):
        head, approximately, tail = one.partition(r"\approx")
        if approximately and r"\approx" not in other:
            return _equal(other, tail if re.fullmatch(NAME, head) else head)
    (name, gold_is, value), (left, answer_is, right) = gold.rpartition("="), answer.rpartition("=")
    if not gold_is and not answer_is:
        return None
    if gold_is and answer_is:
        plain = re.fullmatch(NAME, name) and re.fullmatch(NAME, left)
        return _equal(value, right) if plain else None
    if gold_is:
        return bool(re.fullmatch(NAME, name) or not re.search(r"[-+*^=]|^\d", name)) and _equal(value, answer)
    variables = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", left)
    return (len(variables) != 1 or bool(re.match(rf"{NAME}(?:=|\Z)", left))) and _equal(gold, right)


def _ratios(gold: str, answer: str) -> bool | None:
    if ":" not in gold + answer:
        return None
    parts, others = gold.split(":"), answer.split(":")
    return len(parts) == len(others) <= _ITEMS and all(map(_equal, parts, others))
