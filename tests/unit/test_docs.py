"""The Markdown pages name files, commands, configuration keys, make targets and modules that exist."""

import re
from pathlib import Path

import pytest

from megatron_egrsd import cli
from megatron_egrsd.config_reader import valid_keys

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")]
    if not any(part.startswith(".") or part in ("runs", "build") for part in page.relative_to(ROOT).parts[:-1])
)
COMMANDS = set(cli.COMMANDS)
KEYS = set(valid_keys())
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
# Keys of another program, and Hugging Face's tensors.
FREE = ("parallel.megatron.", "rollout.servers.args.", "objective.options.", "model.embed_tokens.", "model.norm.")
OLD_NAMES = ["CHANGELOG.md"]  # pages that name keys as they were
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SOURCE = re.compile(
    r"(?<![\w/.-])((?:megatron_egrsd|tests|tools|benchmarks|examples|csrc|docs)/[\w/.-]*\.(?:py|sh|md|yaml|cu|cpp|h))\b"
)
COMMAND = re.compile(r"(?:^|[`\s])megatron-egrsd ([a-z][a-z-]*)")
KEY = re.compile(rf"(?:`|--)((?:{SECTIONS})(?:\.[a-z_]+)+)(?=[`= :])")
LATE = re.compile(r"megatron-egrsd (?:train|evaluate)[^`\n]*? --(?!config\b)[\w.]+[^`\n]*? --config (\S+)")
MODULE = re.compile(r"python -m ((?:megatron_egrsd|benchmarks|tools|tests)(?:\.\w+)*)")
TARGET = re.compile(r"(?:^|`)make ([a-z][a-z-]*)", re.MULTILINE)


def slug(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def problems(page: Path) -> list[str]:
    """Return one line for each link, path, command, key, target or module of `page` that does not exist.

    And for each command with keys before `--config FILE`, which the file would override.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            found.append(f"link {link}")
        elif anchor and anchor not in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)):
            found.append(f"anchor {link}")
    found += [f"file {name}" for name in SOURCE.findall(text) if not (ROOT / name).exists()]
    found += [f"command {name}" for name in COMMAND.findall(text) if name not in COMMANDS]
    if page.name not in OLD_NAMES:
        found += [f"key {key}" for key in KEY.findall(text) if key not in KEYS and not key.startswith(FREE)]
    found += [f"target {name}" for name in TARGET.findall(text) if name not in TARGETS]
    found += [f"--config {name} behind keys" for name in LATE.findall(text.replace("\\\n", " "))]
    for name in MODULE.findall(text):
        path = ROOT / name.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            found.append(f"module {name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_on_a_page_exists(page):
    assert not problems(page)


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / link).resolve() for link in LINK.findall(index)}
    assert set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "README.md"} == {
        p for p in linked if p.suffix == ".md"
    }


def test_both_drawings_have_every_package():
    """README's table, and the first block of the design."""
    paths = [p for p in (ROOT / "megatron_egrsd").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    rooms = {p.name + ("/" if p.is_dir() else "") for p in paths}
    rooms -= {"__init__.py", "__main__.py", "console.py", "weighting.py"}  # entry points and old names
    table = "\n".join(re.findall(r"^\|.*", (ROOT / "README.md").read_text(), re.MULTILINE))
    block = FENCE.search((ROOT / "docs/reference/design.md").read_text())[0]
    for drawing in (table, block):
        assert rooms - set(re.findall(r"\w+(?:\.py|/)", drawing)) == set()


def test_a_wrong_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "[a](missing.md) [b](page.md#nothing) `megatron_egrsd/missing.py`\n"
        "`make missing`, `megatron-egrsd missing`, `data.missing`, `python -m tools.missing`\n"
        "`megatron-egrsd train --config a.yaml --steps 1`, `megatron-egrsd train --steps 1 \\\n --config a.yaml`\n# T\n"
    )
    kinds = ["link", "anchor", "file", "command", "key", "target", "--config", "module"]
    assert [line.split()[0] for line in problems(page)] == kinds
