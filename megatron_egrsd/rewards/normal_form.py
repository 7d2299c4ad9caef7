"""One spelling for each answer, and the value of a number.

Every pattern is bounded, because an answer is any string that a policy can sample.
"""

import re
from fractions import Fraction
from typing import Any

from megatron_egrsd.rewards.intervals import as_interval
from megatron_egrsd.rewards.languages import LATIN, plain
from megatron_egrsd.rewards.quantities import plain_amounts, without_currency, without_unit

_DIGITS = 300  # digits and decimal exponents beyond which a number stays text

_SYMBOLS = str.maketrans(
    dict(zip("−–⁄÷，（）：\u202f\u00a0\u2009", "--//,():   ", strict=True))
    | {"×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "±": r"\pm "}
    | {"。": ".", "।": ".", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "≠": r"\neq ", "≈": r"\approx ", "∣": "|"}
    | {"⩽": r"\leq ", "⩾": r"\geq ", "≦": r"\leq ", "≧": r"\geq ", "∓": r"\mp ", "θ": r"\theta "}
    | {
        fraction: rf"\frac{{{top}}}{{{bottom}}}"
        for fraction, top, bottom in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True)
    }
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_WORDS = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|operatorname|mbox|rm)"
_OPERATIONS = "plus|minus|squared|cubed|over|divided|multiplied|factorial|choose|less|times [a-z]"
NAME = r"(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?(?:\(\w+\))?|\((?:[a-zA-Z],)+[a-zA-Z]\))"  # x, x_1, f(x), \theta, (x,y)
_SPELLINGS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]{1,20}", lambda m: f"^{{{m[0].translate(_RAISED)}}}"),
        (r"[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]{1,20}", lambda m: f"_{{{m[0].translate(_LOWERED)}}}"),
        (r"\\(?:left|right|middle|displaystyle|textstyle|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r",\s*\\!\s*|\{,\}", ","),  # a thousands separator
        (r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\?\$|\\[()]", ""),
        (r"\\%", "%"),
        (r"√\s*\(([^()√]{1,60})\)", r"\\sqrt{\1}"),
        (r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}"),
        (r"\\[lr]brace(?![a-zA-Z])", lambda m: r"\{" if "l" in m[0][:2] else r"\}"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\\[a-zA-Z]+|\w)\s*(\\[a-zA-Z]+|\w)", r"\\frac{\1}{\2}"),  # \frac12, \frac \pi4
        (r"\\(le|ge|ne)(?:qq|slant|qslant)?(?![a-zA-Z])", r"\\\1q"),
        (r"([<>!])=", lambda m: {"<": r"\leq ", ">": r"\geq ", "!": r"\neq "}[m[1]]),
        (r"\[(-\s*\\infty)", r"(\1"),
        (r"(\\infty\s*)\]", r"\1)"),
        # Units after a value; "5 \text{ or } 7" and "6 \text{ p.m.}" have no unit.
        (
            rf"(?<=[\d}})])\s*(?:{_WORDS}\s*\{{(?!\s*(?:and|or|[ap]\.?\s?m|{_OPERATIONS})\b)[^{{}}]*\}}"
            r"(?:\^\{?-?\d\}?)?[\s/]*)+\Z",
            "",
        ),
        (rf"{_WORDS}\s*\{{([^{{}}]*)\}}", r" \1 "),
        (r"(?i)(?<![a-z])([ap])\.\s?m\b\.?", r"\1m"),
        (r"(?<=\d)\s*\^?\{?\s*(?:st|nd|rd|th)\b\s*\}?", ""),
        (rf"^{NAME}\s*\\in(?![a-zA-Z])", ""),
        (
            r"^\s*(?:\\(?:approx|simeq|sim)(?![a-zA-Z])|≒|(?:about|approximately|around|roughly|nearly)\b|约|大约|約)\s*",
            "",
        ),
        (r"^\s*(?:the )?(?i:option|choice|选项|選項)\s{0,3}(?=\(?[A-Ja-j]\)?\s*\Z)", ""),
        (r"(?<!\\)\{(\d{1,3}(?:,\d{3})+)\}", lambda m: "{" + m[1].replace(",", "") + "}"),  # \frac{20,000}{3}
    ]
]
_CONDITION = re.compile(r"(?<=\S)(?<!,),?\s{1,4}(?:for (?:any|all|some|every|each)|where|with)\b.{1,80}\Z")
_NOTHING = [
    (
        re.compile(
            r"\\(?:emptyset|varnothing)|\\?\{\s?\\?\}|(?:the )?empty set|none|无解|無解|解なし|해가 없다|нет решений"
            r"|(?:there (?:is|are|exists?) )?no (?:\w{1,12} ){0,2}(?:solutions?|roots?|answers?)(?: exists?)?",
            re.IGNORECASE,
        ),
        r"\emptyset",
    ),
    (re.compile(r"(?:it )?does not exist|dne|undefined|not defined|不存在", re.IGNORECASE), "does not exist"),
]
_UNIT = re.compile(
    r"(-?[\d.,/ ]*\d(?:e[+-]?\d+)?%?\s?|.*(?:[\d})]|\\pi)\s)"  # 18 dollars, 5cm^2, \sqrt{3} square inches
    rf"([{LATIN}]{{2,}}[{LATIN} .'/-]*(?:\^\{{?\d\}}?)?"
    # 10 m/s^2
    r"|(?:m|g|l|L|J|N|W|[kcm]?mol|[kcm]m|[km]g|m[lL]|k[JNW])/(?:s|h|hr|min|m|cm|k?g|l|L|mol|day)(?:\^\{?\d\}?)?)"
)
_NOT_A_UNIT = re.compile(
    rf"(?:pi|sqrt|sin|cos|tan|log|ln|exp|or|and|to|mod|am|pm|{_OPERATIONS})(?![A-Za-z])", re.IGNORECASE
)


def normalize(answer: str) -> str:
    """Rewrite an answer in one spelling: no math delimiters, typesetting, unit or currency; plain words lower-case."""
    s = without_currency(plain(answer.strip().strip("*").strip()))
    s = plain_amounts(s).translate(_SYMBOLS).rstrip(".,;").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if s.startswith(opening) and s.endswith(closing) and len(s) >= len(opening) + len(closing):
            s = s[len(opening) : -len(closing)].strip().rstrip(".,;").strip()
    for pattern, replacement in _SPELLINGS:
        s = pattern.sub(replacement, s)
    s = without_currency(re.sub(r"\s+", " ", s)).strip()
    s = without_separators(s)
    for pattern, name in _NOTHING:
        if pattern.fullmatch(s):
            return name
    s = as_interval(_CONDITION.sub("", without_unit(s)))
    unit = _UNIT.fullmatch(s)
    if unit and not _NOT_A_UNIT.match(unit[2]):
        s = unit[1].strip()
    if choice := re.fullmatch(r"\(?([A-Za-z])\)?", s):
        return choice[1].lower()
    if "\\" not in s:
        s = s.lower()
    if re.search(r"[a-z\\]", s):  # in an expression 2/3 x is a fraction before x; alone it may be part of 1 2/3
        s = re.sub(r"(?<![\w.^_{}/])(?<!sqrt )(\d+)/(\d+)(?![a-hj-zA-Z\d_./({^])", r"\\frac{\1}{\2}", s)
    # Spaces have a meaning between words and letters, and in 1 2/3.
    return re.sub(r"(?<![a-zA-Z]) (?!\d+/\d)| (?![a-zA-Z\d])", "", s).rstrip(".")


def without_separators(text: str) -> str:
    """Return 60,120 or 60 120 as 60120; 60, 120 are two items."""
    if not re.fullmatch(r"-?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?(?!\d)[^,\d]*", text):
        return text
    return re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", text)


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
    s = re.sub(r"^(\d+) ?and ?(?=\\frac|\d+/)", r"\1 ", s)
    fraction = r"(?:\\frac(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))|(\d+)\s?/\s?(\d+))"
    if m := re.fullmatch(r"(\d+ ?(?=\\)|\d+ (?=\d))?\s*" + fraction, s):
        top, bottom = Fraction(m[2] or m[3] or m[6]), Fraction(m[4] or m[5] or m[7])
        return sign * (Fraction((m[1] or "0").strip()) + top / bottom) if bottom else None
    return None
