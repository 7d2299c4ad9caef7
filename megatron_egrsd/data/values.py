"""Values of data fields that should be text: bytes, missing numbers, lists of one item, and such values as text."""

import ast
import math
import re
from typing import Any

_ABSENT = {"nan", "<na>", "nat"}  # pandas' missing values, written as text
_WRAPPED = re.compile(r"\[\s*(['\"]).*\1\s*,?\s*\]|b(['\"]).*\2", re.DOTALL)  # ["2"], ['$7$'], b'2'; not [1, 2]
_LONGEST = 10_000  # characters of a text that may be a list


def plain_value(value: Any) -> Any:
    """Return bytes as text, the item of a list of one, and None for a value that is missing or no finite number."""
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)) and len(value) == 1 and not isinstance(value[0], dict):
        return plain_value(value[0])
    return value


def is_wrapped(text: str) -> bool:
    """Return whether a text is the spelling of a list of texts or of bytes, or of a missing value."""
    text = text.strip()
    return text.lower() in _ABSENT or (len(text) <= _LONGEST and bool(_WRAPPED.fullmatch(text)))


def answer_text(value: Any) -> str:
    """Return an answer as text, "" if it is missing or is no single text or number (a list of several, an object).

    A whole number that is stored as a float loses its ".0".
    """
    value = plain_value(value)
    if isinstance(value, str):
        if not is_wrapped(value):
            return value.strip()
        try:
            inner = plain_value(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return ""
        return answer_text(inner) if inner != value else ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
