"""List the measured numbers of README and docs that lack a source, or are older than the code that they measure.

    python tools/stale_numbers.py            # a line for each section with something to say
    python tools/stale_numbers.py docs/measurements/scaling.md

A section of a page holds measurements if it has quantities (seconds, percent, bytes, ...) and a word of measuring. Its
source is a command of MEASURES, a commit and a machine, in the section or in the page's introduction. If no commit is
named, the newest change of the quantities counts (git blame). The numbers are older than the code if the paths that the
command measures have changed since. That judges nothing: the change may have left the numbers as they were.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guides/*.md", "docs/measurements/*.md", "docs/reference/*.md", "examples/*/README.md")

_LOSS = ("csrc", "megatron_egrsd/vocab_parallel")
_STEP = ("csrc", *(f"megatron_egrsd/{name}" for name in ("engine", "rollout", "sampling", "learn.py", "train.py")))
_PLAN = ("megatron_egrsd/planning", "megatron_egrsd/hf/operations.py")
# Command -> the paths whose changes can change its numbers.
MEASURES = {
    r"benchmarks\.(vocab_parallel|divergence)\b|make bench": _LOSS,
    r"benchmarks\.convert\b": ("megatron_egrsd/hf",),
    r"benchmarks\.(end_to_end|overlap|adapters|check_training)\b": _STEP,
    r"benchmarks\.packing\b": ("megatron_egrsd/data/packing.py",),
    r"benchmarks\.host\b": ("megatron_egrsd/rollout", "megatron_egrsd/rewards", "megatron_egrsd/sampling"),
    r"benchmarks\.step_time\b|megatron-egrsd plan|--dry-run": _PLAN,
    r"benchmarks\.checkpoints\b": (
        *(f"megatron_egrsd/engine/{name}.py" for name in ("checkpoint", "checkpoint_writer", "training_state")),
        "megatron_egrsd/system/files.py",
    ),
    r"benchmarks\.routing_replay\b": ("megatron_egrsd/engine", "megatron_egrsd/rollout"),
    r"benchmarks\.weight_sync\b": ("megatron_egrsd/rollout", "megatron_egrsd/engine/weights.py"),
    r"benchmarks\.mechanism\b": (
        "benchmarks/mechanism",
        "megatron_egrsd/objectives/egrsd.py",
        "megatron_egrsd/report/mechanism.py",
    ),
    r"validate_method": ("megatron_egrsd/objectives", *_STEP),
    r"reproduce_paper": ("benchmarks/reproduce_paper", "megatron_egrsd/planning"),
    r"make demo|examples/configs/tiny_cpu\.yaml": ("megatron_egrsd/objectives", "examples/tiny", *_STEP),
    r"make soak|tests/faults": ("megatron_egrsd/run", "tests/faults", *_STEP),
    r"make test": ("tests",),
    r"benchmarks\.check_verifier\b": ("megatron_egrsd/rewards",),
    r"megatron-egrsd evaluate": ("megatron_egrsd/evaluation", "megatron_egrsd/rollout"),
    r"test_pages\.py": ("megatron_egrsd/report",),
    r"examples/tiny/make_model\.py": ("examples/tiny/make_model.py",),
}
_QUANTITY = re.compile(  # 95 % is the level of an interval
    r"(?<![\w.])(?!95 %)\d[\d,.]*\s?(?:ms|us|ns|s|%|[KMGT]i?B(?:/s)?|GFLOP/s|minutes|hours|points|times)(?!\w)"
)
_MACHINE = re.compile(r"\bcores?\b|EPYC|\bXeon\b|\bZen \d|\bload (?:average|of|at)?\b|\bA100|\bH[12]00", re.IGNORECASE)
_MEASURED = re.compile(r"measured|median|took|load average|at load|\bcores\b|seed \d", re.IGNORECASE)
_COMMIT = re.compile(r"\bcommits?\s+([0-9a-f]{7,40})(?:\s+to\s+([0-9a-f]{7,40}))?")


@dataclass(frozen=True)
class Section:
    """A heading's own text; `context` is the page's introduction. Lines are counted from 1, both ends included."""

    page: str
    heading: str
    first: int
    last: int
    text: str
    context: str

    @property
    def holds_measurements(self) -> bool:
        return bool(_QUANTITY.search(self.text) and _MEASURED.search(self.text))


def sections(page: str, text: str) -> Iterator[Section]:
    """Yield the sections of a page, the introduction first."""
    lines = text.splitlines()
    fenced, starts = False, [0]
    for number, line in enumerate(lines):
        fenced ^= line.startswith("```")
        if number and not fenced and re.match(r"#{1,4} ", line):
            starts.append(number)
    introduction = "\n".join(lines[: starts[1] if len(starts) > 1 else None])
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        heading = lines[start].lstrip("# ") if lines else ""
        yield Section(page, heading, start + 1, end, "\n".join(lines[start:end]), introduction if start else "")


def remarks(section: Section, root: Path = ROOT) -> list[str]:
    """Return what there is to say about the numbers of a section; nothing if they have a source that is not older."""
    whole = f"{section.text}\n{section.context}"
    own = [paths for pattern, paths in MEASURES.items() if re.search(pattern, section.text)]
    measured = own or [paths for pattern, paths in MEASURES.items() if re.search(pattern, section.context)]
    named = _COMMIT.search(section.text) or _COMMIT.search(section.context)
    found = [] if measured else ["no command"]
    found += [] if named else ["no commit"]
    found += [] if _MACHINE.search(whole) else ["no machine"]
    commit = named[named.lastindex] if named else _changed(section, root)
    if measured and commit:
        paths = sorted({path for group in measured for path in group})
        try:
            newer = _git(root, "log", "--format=%h", f"{commit}..HEAD", "--", *paths).split()
        except subprocess.CalledProcessError:
            return [*found, f"commit {commit} is not in this repository"]
        if newer:
            found.append(f"older than the code: {len(newer)} commits to {', '.join(paths)} since {commit[:7]}, the "
                         f"newest {newer[0]}")  # fmt: skip
    return found


def _changed(section: Section, root: Path) -> str:
    """Return the newest commit that changed a line with a quantity; "" if they are not committed."""
    lines = [n for n, line in enumerate(section.text.splitlines(), section.first) if _QUANTITY.search(line)]
    spans = [word for n in lines for word in ("-L", f"{n},{n}")]
    if not _git(root, "ls-files", "--", section.page):
        return ""
    porcelain = _git(root, "blame", "--line-porcelain", *spans, "--", section.page)
    commits = re.findall(r"^([0-9a-f]{40}) \d+ \d+", porcelain, re.M)
    times = [int(time) for time in re.findall(r"^committer-time (\d+)$", porcelain, re.M)]
    _, newest = max(zip(times, commits, strict=True))
    return "" if set(newest) == {"0"} else newest


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="default: README.md, docs/*/ and the READMEs of examples/*/")
    pages = parser.parse_args().pages or [str(p.relative_to(ROOT)) for glob in PAGES for p in sorted(ROOT.glob(glob))]
    count = 0
    for page in pages:
        for section in sections(page, (ROOT / page).read_text(encoding="utf-8")):
            if section.holds_measurements and (found := remarks(section)):
                count += 1
                print(f"{page}:{section.first}: {section.heading}: {'; '.join(found)}")
    print(f"{count} sections", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
