"""The docstring of a function begins with a verb (CONTRIBUTING.md, Language)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORD = re.compile(r"[A-Z][a-z]+(?=[\s.,:;]|$)")  # no formula, bracket, backtick or quote, and nothing with an 's
# Articles, question words, prepositions, nouns of quantity, and a plural or the third person, which ends in one s.
NO_VERB = re.compile(
    "A|An|The|This|That|These|Those|It|One|Two|Every|Each|All|Both|Some|Any|No|Not|"
    "What|Why|Whether|Where|When|Which|Who|Whose|How|Does|Is|Are|If|"
    "Of|For|From|In|To|On|At|By|With|Without|As|After|Before|Once|Also|About|And|Or|"
    r"Number|Probability|Length|Share|Size|Memory|Shape|Mean|Exact|Endless|Forward|Random|Position|Supervised|\w*[^s]s"
)


def wrong(source: str) -> Iterator[str]:
    """Yield the first line of each function's docstring that does not begin with a verb; a property may have a noun."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            word = WORD.match(text)
            noun = word is None or NO_VERB.fullmatch(word[0])
            if noun and not any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield text.splitlines()[0]


@pytest.mark.parametrize("folder", ["megatron_egrsd", "benchmarks", "tools"])
def test_docstrings_of_functions_begin_with_a_verb(folder):
    assert [line for path in (ROOT / folder).rglob("*.py") for line in wrong(path.read_text("utf-8"))] == []


@pytest.mark.parametrize("text", ["The loss.", "W_t = 1", "[T] fp32", "`x` of y.", "Seconds.", "Gives x", "Liger's"])
def test_a_noun_is_found(text):
    assert list(wrong(f'def f():\n    """{text}"""')) == [text]
