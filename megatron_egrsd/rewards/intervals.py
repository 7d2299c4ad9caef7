"""Sets that are written by a condition, as intervals: {x | -2 <= x < 1} is [-2, 1)."""

import re

_SPAN = 200  # characters beyond which a set stays as it is
_VARIABLE = r"[a-zA-Z]|\\[a-z]{1,10}"
_BUILDER = re.compile(
    rf"\\?\{{\s*({_VARIABLE})\s*(?:\\in\s*(?:\\mathbb\s*\{{?\s*R\s*\}}?|\\R(?![a-zA-Z])|ℝ)\s*)?"
    r"(?:\\mid(?![a-zA-Z])|\\?\||:|\\(?:l|r)?vert(?![a-zA-Z])|\\colon(?![a-zA-Z])|;)\s*(.{1,200}?)\s*\\?\}"
)
_RELATION = r"(\\neq?(?![a-zA-Z])|\\leq?(?![a-zA-Z])|\\geq?(?![a-zA-Z])|<=|>=|<|>|\\lt(?![a-zA-Z])|\\gt(?![a-zA-Z]))"
_REVERSED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
_NAMES = {r"\ne": r"\neq", "<=": r"\leq", ">=": r"\geq", r"\le": r"\leq", r"\ge": r"\geq", r"\lt": "<", r"\gt": ">"}
_OR = re.compile(r"\s*(?:\\text\s?\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\lor(?![a-zA-Z])|\\cup(?![a-zA-Z]))\s*")


def as_interval(text: str) -> str:
    """Return the interval, or the union of intervals, of a set over the reals whose condition bounds its variable.

    Any other text is returned as it is.
    """
    built = _BUILDER.fullmatch(text) if len(text) <= _SPAN else None
    if built is None:
        return text
    parts = [_interval(part, built[1]) for part in _OR.split(built[2])]
    return r"\cup ".join(part for part in parts if part) if all(parts) else text


def _interval(condition: str, variable: str) -> str | None:
    """Return the interval of -2 <= x < 1, of x > 3 or 3 < x, the two of x != 3; None for any other condition."""
    words = [word.strip() for word in re.split(_RELATION, condition)]
    terms, relations = words[::2], [_NAMES.get(r, r) for r in words[1::2]]
    if len(terms) not in (2, 3) or terms.count(variable) != 1 or not all(terms):
        return None
    place = terms.index(variable)
    if len(terms) == 3 and place != 1:
        return None
    if r"\neq" in relations:
        return None if len(terms) == 3 else rf"(-\infty,{terms[1 - place]})\cup ({terms[1 - place]},\infty)"
    bounds = {}  # of the variable, from its side: "x > 3" bounds it below
    if place + 1 < len(terms):
        bounds[relations[place]] = terms[place + 1]
    if place:
        bounds[_REVERSED[relations[place - 1]]] = terms[place - 1]
    lower = next(((r, bounds[r]) for r in (">", r"\geq") if r in bounds), None)
    upper = next(((r, bounds[r]) for r in ("<", r"\leq") if r in bounds), None)
    if len(terms) == 3 and not (lower and upper):
        return None
    left = ("[" if lower[0] == r"\geq" else "(") + lower[1] if lower else r"(-\infty"
    right = upper[1] + ("]" if upper[0] == r"\leq" else ")") if upper else r"\infty)"
    return f"{left},{right}"
