"""Amounts: currencies, degrees, scale words ("1.5 million") and units, with the factors between some of them."""

import re
from fractions import Fraction

from megatron_egrsd.rewards.languages import LATIN, LETTERS

CURRENCY = "€£¥₹₽₩₺₫฿₦₪₱₴₸₡₲₵₭₮"
_CODES = r"(?:US|HK|NT|AU?|CA?|S)(?=\\?\$)|(?:USD|EUR|GBP|CNY|RMB|JPY|INR|Rs|KRW|CHF|R)\b\.?"
_PREFIX = re.compile(
    rf"(?:\\(?:pounds|euro|texteuro|yen|textsterling|mathsterling|rupee)(?![a-zA-Z])|[{CURRENCY}]"
    rf"|(?<![A-Za-z\\])(?:{_CODES})(?=\s*\\?[$\d{CURRENCY}]))\s*"
)

_DEGREE = r"(?:\^\s*\{?\s*(?:\\circ|\\degree|◦|°)\s*\}?|[°º˚]|\\degree(?![a-zA-Z])|\\deg(?![a-zA-Z]))"
_ANGLE = re.compile(r"\\ang\s*\{(-?\d+(?:\.\d+)?)\}")
_TRIGONOMETRIC = re.compile(
    r"\\?\b(sin|cos|tan|cot|sec|csc)(\s*\^\s*\{?\s*-?\d\s*\}?)?\s*(?:\\left)?([({]?)\s*"
    rf"(-?\d{{1,6}}(?:\.\d{{1,6}})?)\s*{_DEGREE}\s*(?:\\right)?[)}}]?"
)

_SCALES = {
    2: "hundred|hundreds",
    3: "thousand|thousands|тыс|тысяч|тысячи|천|千|हज़ार|हजार",
    4: "万|萬|만",
    5: "lakh|lakhs|lac|लाख",
    6: "million|millions|mn|mln|млн|миллион|миллиона|миллионов|millones|millón|millionen|milhões|milioni|triệu|juta",
    7: "crore|crores|करोड़",
    8: "亿|億|억",
    9: "billion|billions|bn|млрд|миллиард|миллиарда|миллиардов|milliarden|milliards|milliard|miliardi|tỷ",
    12: "trillion|trillions|兆|조",
}
_POWERS = {word: power for power, words in _SCALES.items() for word in words.split("|")}
_WORD = "|".join(sorted(map(re.escape, _POWERS), key=len, reverse=True))
_TEXT = r"(?:\\(?:text|textrm|textbf|mathrm|mbox|rm)\s*\{\s*)?"
_AMOUNT = r"\d[\d,]{0,30}(?:\.\d{1,30})?"
SCALE = rf"[ ~]?(?:{_WORD})(?![{LATIN}])"
_SCALED = re.compile(rf"({_AMOUNT})[\s~\\,;]{{0,4}}{_TEXT}\s*({_WORD})(?![{LATIN}])\.?(?:\s*\}})?", re.IGNORECASE)
_PERCENT = re.compile(
    rf"(?<=[\d}}])\s*{_TEXT}\s*(?:percent|per cent|pct|por ciento|prozent|процентов|процента|процент"
    "|प्रतिशत|퍼센트|パーセント)"
    rf"(?![{LATIN}])(?:\s*\}})?",
    re.IGNORECASE,
)
_FOREIGN_UNIT = re.compile(rf"(?<=[\d}})%])\s*[{LETTERS}][{LETTERS} .]{{0,40}}\Z")
_IN_BRACKETS = re.compile(rf"(?<=[\d}}%])\s{{1,4}}\((?:[{LATIN}]{{3}}[{LATIN} /.-]{{0,40}}|[{LETTERS} ]{{1,20}})\)\Z")

# Unit -> (dimension, factor to its first unit). Only units of one dimension are compared.
_FACTORS: dict[str, dict[str, int | str]] = {
    "length": {"m": 1, "mm": "1e-3", "cm": "1e-2", "dm": "1e-1", "km": 1000, "meter": 1, "metre": 1, "kilometer": 1000,
               "kilometre": 1000, "centimeter": "1e-2", "centimetre": "1e-2", "millimeter": "1e-3",
               "millimetre": "1e-3"},
    "imperial length": {"inch": 1, "inche": 1, "foot": 12, "feet": 12, "ft": 12, "yard": 36, "yd": 36, "mile": 63360},
    "mass": {"g": 1, "mg": "1e-3", "kg": 1000, "gram": 1, "kilogram": 1000, "milligram": "1e-3", "ton": 1000000,
             "tonne": 1000000},
    "time": {"s": 1, "sec": 1, "second": 1, "ms": "1e-3", "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600,
             "day": 86400, "week": 604800},
    "volume": {"l": 1, "ml": "1e-3", "liter": 1, "litre": 1, "milliliter": "1e-3", "millilitre": "1e-3"},
    "money": {"dollar": 100, "cent": 1},
}  # fmt: skip
_KNOWN = {unit: (name, Fraction(f)) for name, units in _FACTORS.items() for unit, f in units.items()}
_QUANTITY = re.compile(rf"\s*\$?\s*(-?{_AMOUNT})\s*\$?[\s~\\,;]{{0,4}}{_TEXT}\s*([A-Za-z]{{1,12}})\s*\}}?\s*\$?\.?\s*")


def without_currency(text: str) -> str:
    """Remove the signs and codes of currencies; amounts in two currencies are not told apart."""
    return _PREFIX.sub("", text)


def plain_amounts(text: str) -> str:
    """Rewrite scale words as powers of ten and percent as %; angles within a function become radians, others plain."""
    text = _ANGLE.sub(r"\1^\\circ", text)
    text = _TRIGONOMETRIC.sub(lambda m: rf"\{m[1]}{m[2] or ''}(\frac{{{m[4]}\pi}}{{180}})", text)
    text = re.sub(rf"\s*{_DEGREE}\s*(?:[CFcf]\b)?", "", text)
    text = _SCALED.sub(lambda m: rf"{m[1].replace(',', '')}\times 10^{{{_POWERS[m[2].lower()]}}} ", text)
    return _PERCENT.sub("%", text)


def without_unit(text: str) -> str:
    """Remove a unit in another script, or in brackets, from the end of a value."""
    return _IN_BRACKETS.sub("", _FOREIGN_UNIT.sub("", text))


def other_quantity(gold: str, answer: str) -> bool | None:
    """Compare two amounts with known units: 5 km is 5000 m and not 5 m. None if one has no unit, or an unknown one."""
    found = [_QUANTITY.fullmatch(text) for text in (gold, answer)]
    units = [
        _KNOWN.get(m[2].lower().removesuffix("s") if len(m[2]) > 2 else m[2].lower()) if m else None for m in found
    ]
    if None in units or len({m[2] for m in found}) == 1:
        return None
    (kind, factor), (other_kind, other_factor) = units
    values = [Fraction(m[1].replace(",", "")) for m in found]
    return kind == other_kind and values[0] * factor == values[1] * other_factor
