"""The classes of response tokens: by their characters, and by their part in the text (style, task or other).

Style and task are the words of RLCSD (arXiv 2606.11709): discourse markers, delimiters and structure on one side,
digits and operators on the other. No list of its tokens was found; the rules and words here are ours. Names, things
and verbs of the story are "other".
"""

import re

KINDS = ("word", "number", "symbol", "space", "newline", "end of turn")
ROLES = ("style", "other", "task")

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_OPERATORS = set("+=/×÷·−<>≤≥≈≠%^√±")
_MONEY = set("$€£¥")
_BETWEEN = " $)]}"  # may stand between a number and the "-" or "*" behind it
_DISCOURSE = """
so therefore thus hence then now next first firstly secondly finally lastly also additionally moreover furthermore
however but because since although though while instead alternatively actually wait hmm oh ok okay well right yes no
sure certainly great let lets let's we i you our us my your please note remember recall given here there overall
summary conclusion conclude step steps solution answer explanation explain reason reasoning approach problem question
find calculate compute determine solve check verify think know need want help following above below
"""
_ARITHMETIC = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half third quarter
fifth tenth twice thrice double triple plus minus times multiply multiplied multiplying divide divided dividing add
added adding subtract subtracted subtracting equal equals sum difference product quotient percent percentage fraction
frac dfrac tfrac cdot div sqrt boxed
"""
_ROLE = dict.fromkeys(_DISCOURSE.split(), "style") | dict.fromkeys(_ARITHMETIC.split(), "task")


def token_kinds(pieces: list[str], ended: bool) -> list[int]:
    """Return indices into KINDS. `ended`: the last token ends the turn.

    A piece with a letter is a word, any other with a digit a number. A byte of a character whose text comes with a
    later token is a symbol.
    """
    kinds = []
    for piece in pieces:
        if any(c.isalpha() for c in piece):
            kind = "word"
        elif any(c.isdigit() for c in piece):
            kind = "number"
        elif piece.isspace():
            kind = "newline" if "\n" in piece else "space"
        else:
            kind = "symbol"
        kinds.append(KINDS.index(kind))
    return [*kinds[:-1], KINDS.index("end of turn")] if ended and kinds else kinds


def token_roles(pieces: list[str], ended: bool) -> list[int]:
    """Return indices into ROLES; a part of a word has the role of the whole word. `ended` as in `token_kinds`.

    task: digits, the separators within a number, operators, currency signs, number words, words of arithmetic, and
    single letters that are no English words. style: other punctuation and whitespace, discourse words, the end of the
    turn. The space that tokenizers of single digits put before a number is other: it chooses that a number comes.
    """
    text = "".join(pieces)
    words = [(match.start(), match.end(), _role_of_word(match[0])) for match in _WORD.finditer(text)]
    roles, start, word = [], 0, 0
    for piece in pieces:
        letter = next((start + i for i, c in enumerate(piece) if c.isalpha()), None)
        if any(c.isdigit() for c in piece):
            role = "task"
        elif letter is not None:
            while words[word][1] <= letter:
                word += 1
            role = words[word][2]
        elif any(_calculates(text, start + i) for i in range(len(piece))):
            role = "task"
        else:
            before_number = text[start + len(piece) : start + len(piece) + 1].isdigit()
            role = "other" if piece.isspace() and "\n" not in piece and before_number else "style"
        roles.append(ROLES.index(role))
        start += len(piece)
    return [*roles[:-1], ROLES.index("style")] if ended and roles else roles


def _role_of_word(word: str) -> str:
    if len(word) == 1 and word not in "aAI":
        return "task"
    return _ROLE.get(word.lower().replace("’", "'"), "other")


def _calculates(text: str, place: int) -> bool:
    """Return whether the character, neither letter nor digit, is an operator or part of a number or an amount."""
    sign, before, after = text[place], text[:place], text[place + 1 : place + 2]
    if sign in _OPERATORS | _MONEY:
        return True
    if sign in ".,":
        return before[-1:].isdigit() and after.isdigit()
    return sign in "-*" and before[-1:] != sign and after != sign and before.rstrip(_BETWEEN)[-1:].isdigit()
