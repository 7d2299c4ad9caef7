"""Comparison of a Hugging Face and a Megatron checkpoint, tensor by tensor, bit by bit."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_egrsd.errors import RunError
from megatron_egrsd.hf.byte_ranges import Advance, digest, in_threads, pieces
from megatron_egrsd.hf.checkpoint import CONFIG, HFCheckpoint, assets, config_with_dtype
from megatron_egrsd.hf.convert import RECORD, record_of
from megatron_egrsd.hf.mapping import Entry, entries, hf_shapes
from megatron_egrsd.hf.megatron_checkpoint import SIDECAR, MegatronCheckpoint, locate
from megatron_egrsd.system.files import read_json_object, write_text


def verify(
    hf_path: str | Path,
    megatron_path: str | Path,
    dtype: torch.dtype | None = None,
    advance: Advance = lambda nbytes: None,
    hashes: bool = False,
) -> dict:
    """Compare names, shapes, types, bytes and the files beside the weights; returns the report.

    `report["problems"]` names every tensor and file that differs; it is empty if the two are the same model.
    `report["tensors"]` has name, place and shape of each tensor. With `hashes`, which take longer than the comparison,
    it also has the SHA-256 of both sides. `dtype` is the value of `to-megatron --dtype`: the Hugging Face side is
    rounded to it first. Raises BadArgument if a side is no checkpoint.
    """
    hf = HFCheckpoint(hf_path)
    hf.check_tied_head()
    _, root = locate(Path(megatron_path))
    own = any((root / name).exists() for name in (RECORD, SIDECAR))
    megatron = MegatronCheckpoint(megatron_path, like=None if own else hf_path)
    problems = [
        f"{megatron.directory / name} is damaged: its SHA-256 is not the one in integrity.json"
        for name in megatron.reader.damaged_files()
    ]
    if megatron.architecture != hf.architecture:
        problems.append(f"{megatron.like}/config.json describes another model than {hf.path}/config.json")
    elif own:
        problems += _different_files(hf.path, megatron.like, dtype or hf.dtype())
        expected = record_of(hf, dtype or hf.dtype())
        if read_json_object(megatron.root / RECORD) != expected:
            problems.append(f"{megatron.root / RECORD} is not {json.dumps(expected)}")
    megatron.architecture = hf.architecture
    structure = megatron.problems()
    problems += structure
    tensors = [] if structure else _compare(hf, megatron, dtype, hashes, problems, advance)
    return {
        "hf_path": str(hf.path),
        "megatron_path": str(megatron.path),
        "tensors": tensors,
        "training_state_ignored": len(megatron.training_state()),
        "problems": problems,
    }


def write_report(report: dict, path: Path) -> None:
    """Write the report as JSON, all of it or nothing. Raises RunError if `path` cannot be written."""
    write_text(path, json.dumps(report, indent=1) + "\n")


def _compare(hf: HFCheckpoint, megatron: MegatronCheckpoint, dtype: torch.dtype | None, hashes: bool,
             problems: list[str], advance: Advance) -> list[dict]:  # fmt: skip
    """Return the report's rows and append every difference to `problems`."""
    arch, stored = hf.architecture, hf.dtype()
    expected, shapes = dtype or stored, hf_shapes(arch)
    rows: dict[str, dict] = {}
    wrong: dict[str, str] = {}

    def compare(entry: Entry) -> Iterator[int]:
        stored_as, found = megatron.stored_as(entry), megatron.dtype_of(entry)
        try:
            ranges = megatron.ranges(entry, shapes)
            for name in entry.hf:
                sides = pieces([hf.range(name)], stored, expected), pieces(ranges[name], found, found)
                if expected != found:
                    wrong[name] = (f"{name} is {expected} in Hugging Face and {found} in Megatron; "
                                   "pass --dtype if that was asked for")  # fmt: skip
                    digests = [digest(side) for side in sides] if hashes else []
                else:
                    count, digests = _difference(*sides, expected, hashes)
                    if count:
                        wrong[name] = f"{name} differs from {stored_as}: {count} of {math.prod(shapes[name])} values"
                rows[name] = {"name": name, "megatron": stored_as, "shape": list(shapes[name]), "dtype": str(found)}
                rows[name] |= zip(("sha256_hf", "sha256_megatron"), digests, strict=False)
                yield math.prod(shapes[name]) * expected.itemsize
        except RunError as error:
            wrong[entry.hf[0]] = str(error)

    in_threads(map(compare, entries(arch)), advance)
    problems += [wrong[name] for name in shapes if name in wrong]
    return [rows[name] for name in shapes if name in rows]


def _difference(left: Iterator[memoryview], right: Iterator[memoryview], dtype: torch.dtype,
                hashes: bool) -> tuple[int, list[str]]:  # fmt: skip
    """Return the number of values that differ in a bit and, if `hashes`, the SHA-256 of both sides."""
    bits = {2: np.int16, 4: np.int32}[dtype.itemsize]
    count, first, second = 0, hashlib.sha256(), None
    for a, b in zip(left, right, strict=True):
        count += int(np.count_nonzero(np.frombuffer(a, bits) != np.frombuffer(b, bits)))
        if hashes:
            if count and not second:
                second = first.copy()  # both sides share one hash until they differ
            first.update(a)
            if second:
                second.update(b)
    return count, [first.hexdigest(), (second or first).hexdigest()] if hashes else []


def _different_files(hf: Path, carried: Path, dtype: torch.dtype) -> list[str]:
    """Return the differences of the files beside the weights; config.json may name the `dtype` of the conversion."""
    left, right = assets(hf), assets(carried)
    problems = [f"{name} is missing from {carried}" for name in left.keys() - right.keys()]
    problems += [f"{name} in {carried} is not in {hf}" for name in right.keys() - left.keys()]
    for name in sorted(left.keys() & right.keys()):
        expected, found = [left[name].read_bytes()], right[name].read_bytes()
        if name == CONFIG:
            expected.append(config_with_dtype(left[name], dtype))
        if found not in expected:
            problems.append(f"{name} differs between {hf} and {carried}")
    return problems
