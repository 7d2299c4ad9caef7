"""The list of measured numbers without a source, or older than the code that they measure."""

import re
import subprocess
from pathlib import Path

import pytest

from tools.stale_numbers import MEASURES, remarks, sections

ROOT = Path(__file__).resolve().parents[2]
PAGE = "page.md"
INTRODUCTION = "# Speed\n\nMeasured on two cores.\n\n"


@pytest.fixture
def repository(tmp_path):
    """Return a function that commits files, and returns the commit's name."""

    def commit(**files: str) -> str:
        for name, text in files.items():
            path = tmp_path / {"page": PAGE, "code": "megatron_egrsd/hf/convert.py"}[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *who, "commit", "-qm", "c", "--allow-empty"], cwd=tmp_path, check=True)
        words = ["git", "rev-parse", "--short=7", "HEAD"]
        return subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path, commit


def said(root: Path) -> dict[str, list[str]]:
    text = (root / PAGE).read_text()
    return {s.heading: remarks(s, root) for s in sections(PAGE, text) if s.holds_measurements}


def test_a_number_with_a_source_is_stale_as_soon_as_its_code_changes(repository):
    root, commit = repository
    old = commit(code="1")
    page = f"{INTRODUCTION}## Conversion\n\n`python -m benchmarks.convert`, commit {old}: the median is 3 s.\n"
    commit(page=page)
    assert said(root) == {"Conversion": []}
    new = commit(code="2")
    (found,) = said(root)["Conversion"]
    assert found == f"older than the code: 1 commits to megatron_egrsd/hf since {old}, the newest {new}"
    commit(page=page.replace(old, new))
    assert said(root) == {"Conversion": []}
    commit(page=page.replace(old, "1234567"))
    assert said(root) == {"Conversion": ["commit 1234567 is not in this repository"]}


def test_what_a_number_lacks_is_named(repository):
    root, commit = repository
    commit(page="# Notes\n\nIt took 3 s.\n\n## Later\n\nIt waits at most 30 s.\n", code="1")
    assert said(root) == {"Notes": ["no command", "no commit", "no machine"]}  # a limit is no measurement
    commit(page="# Notes\n\nThe median, with its 95 % interval.\n\n## File\n\n1.4 MB of scores.\n")
    assert said(root) == {}  # neither is the level of an interval, or the size of a file of scores
    commit(page="# Notes\n\nIt took 3 s on an AMD Zen 3.\n")
    assert said(root) == {"Notes": ["no command", "no commit"]}


def test_without_a_commit_the_last_change_of_the_number_counts(repository):
    root, commit = repository
    page = INTRODUCTION + "## Conversion\n\n`python -m benchmarks.convert`\n\n| median | 3 s |\n"
    commit(code="1", page=page)
    assert said(root) == {"Conversion": ["no commit"]}
    (found,) = [s for s in sections("new.md", page) if s.holds_measurements]  # a page that git does not know yet
    (root / "new.md").write_text(page)
    assert remarks(found, root) == ["no commit"]
    commit(code="2")
    commit(page=page + "\nAnother line.\n")
    assert [text.split(":")[0] for text in said(root)["Conversion"]] == ["no commit", "older than the code"]
    commit(page=page.replace("3 s", "2 s"))
    assert said(root) == {"Conversion": ["no commit"]}


def test_headings_in_code_are_none():
    found = list(sections(PAGE, "# A\n```\n# comment\n```\n## B\ntext\n"))
    assert [(s.heading, s.first, s.last) for s in found] == [("A", 1, 4), ("B", 5, 6)]


def test_measured_paths_exist():
    assert all((ROOT / path).exists() for paths in MEASURES.values() for path in paths)


def test_every_benchmark_has_paths():
    names = re.findall(r"`python -m (benchmarks\.\w+)`", (ROOT / "benchmarks/README.md").read_text())
    assert len(names) > 10 and [n for n in names if not any(re.search(p, n) for p in MEASURES)] == []
