"""Detection of training problems that are in an evaluation set."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_egrsd.preparation.readers import read_problems

NGRAM = 13  # words, as in GPT-3's contamination study: shorter runs are often boilerplate


def words(text: str) -> tuple[str, ...]:
    """Return the words of a problem without case, punctuation and LaTeX commands, which differ between collections."""
    text = re.sub(r"\\[a-zA-Z]+", " ", unicodedata.normalize("NFKC", text))
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


class Contamination:
    """The evaluation problems' 13-grams; a problem of fewer words must be met as a whole."""

    def __init__(self, sources: Iterable[str]):
        self.grams: dict[tuple[str, ...], str] = {}
        self.whole: dict[tuple[str, ...], str] = {}
        for source in sources:
            for problem in read_problems(source):
                text, name = words(problem.problem), f"{Path(source).name}:{problem.id}"
                self.whole.setdefault(text, name)
                for gram in _grams(text):
                    self.grams.setdefault(gram, name)

    def find(self, problem: str) -> str | None:
        """Return the name of the evaluation problem that shares a 13-gram with `problem` or is the same, else None."""
        text = words(problem)
        return self.whole.get(text) or next((self.grams[g] for g in _grams(text) if g in self.grams), None)


def _grams(text: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1))
