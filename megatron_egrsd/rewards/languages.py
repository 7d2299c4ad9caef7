"""Answers in other languages and scripts: their digits and marks, and the words that announce an answer."""

import re
import unicodedata

# Letters, signs and vowel marks of scripts other than Latin and Greek, as the inside of a character class.
LETTERS = "\u0400-\u1dff\u2e80-\u2fff\u3005-\u3007\u3021-\u3029\u3031-\ua4cf\uac00-\ud7ff\uf900-\ufaff\ufb1d-\ufefc"
LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"

_DIGITS = {
    ord(c): str(unicodedata.decimal(c))
    for c in map(chr, range(0x80, 0x1FFFF))
    if unicodedata.category(c) == "Nd"  # Devanagari, Arabic, Thai, full width, bold mathematical digits, ...
}
_MARKS = dict(
    zip(
        map(ord, "，、،；（）：％．٫٬＝＋－＜＞｛｝［］／＄￥￡"),
        (*",,,;():%.", ".", ",", *"=+-<>{}[]/$", "¥", "£"),
        strict=True,
    )
)
_TABLE = _DIGITS | _MARKS

# "answer", then the verb or mark before its value, each if there is one. Some languages have the verb behind the value.
_ANSWER = (
    r"答案|答え|解答|正解|結果は|结果是|結果是|[정해]답|답[은는이:]|Ответ(?:ом)?|Відповідь|Отговор|उत्तर|উত্তর|જવાબ|பதில்|விடை|సమాధానం|"
    r"ఉత్తరం|ಉತ್ತರ|ഉത്തരം|الجواب|الإجابة|الاجابة|پاسخ|جواب|התשובה|תשובה|คำตอบ|απάντηση"
)
_LATIN_ANSWER = (
    "réponse|respuesta|resposta|risposta|antwort|ergebnis|antwoord|svaret|svar|odpowiedź|odpověď|cevap|yanıt|đáp án|"
    "đáp số|câu trả lời|jawabannya|jawaban|jibu"
)
_VERB = (
    "[是为為はがをは]|等于|等於|应为|應為|должен быть|является|равен|равно|составляет|[은는이가]|هو|هي|است|"
    "होगा|है|হল|হলো|คือ|είναι|היא|הוא"
)
_LATIN_VERB = "est|es|é|è|ist|lautet|is|är|er|to|je|là|adalah|ialah|ni"
_FINAL = "最终|最終|النهائية|النهائي|finale|final|cuối cùng|akhir"
MARKER = (
    rf"(?:(?:{_ANSWER})|(?<![{LATIN}])(?:{_LATIN_ANSWER})(?![{LATIN}]))(?:\s{{0,4}}(?:{_FINAL}))?[\s*]{{0,4}}"
    rf"(?:{_VERB}|(?:{_LATIN_VERB})(?![{LATIN}])|[—–=-](?=\s))?[:\s*]{{0,6}}"
)
# "choose", before the letter of a choice.
CHOOSE = r"(?:[故应應]?[选選]|选项|選項|選択肢)[是为為:\s*]{0,4}"

_END = "。！？।؟"
SENTENCE_END = re.compile(rf"\.(?:\s|\Z)|[{_END}]|\n")
_LONG_WORDS = re.compile(rf"[{LETTERS}]")
_VALUE_AND_UNIT = re.compile(rf"[^{LETTERS}]{{1,80}}[{LETTERS}]{{1,8}}[\s.{_END}]{{0,4}}")


def plain(text: str) -> str:
    """Return `text` with the digits and the full-width and Arabic marks of all scripts as those of ASCII."""
    return text if text.isascii() else text.translate(_TABLE)


def is_sentence(text: str) -> bool:
    """Return whether a text in another script says more than one value with its unit."""
    return bool(_LONG_WORDS.search(text) and re.search(r"\d", text) and not _VALUE_AND_UNIT.fullmatch(text))
