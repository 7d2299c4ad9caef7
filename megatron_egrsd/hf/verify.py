"""Comparing a Hugging Face and a Megatron checkpoint tensor by tensor, bit by bit."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf.checkpoint import HFCheckpoint, assets
from megatron_egrsd.hf.convert import RECORD, record_of
from megatron_egrsd.hf.mapping import entries
from megatron_egrsd.hf.megatron_checkpoint import SIDECAR, MegatronCheckpoint, places, read_json
from megatron_egrsd.hf.safetensors_file import raw_bytes


def verify(
    hf_path: str | Path,
    megatron_path: str | Path,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> dict:
    """Compare names, shapes, types, bytes and the files beside the weights; returns the report.

    `report["problems"]` is empty where the two are the same model, and names every tensor and file that is not.
    `report["tensors"]` has name, place, shape and SHA-256 of each tensor on both sides. `dtype` is the type that
    `to-megatron --dtype` was given: the Hugging Face side is rounded to it first. BadArgument where a side is no
    checkpoint at all.
    """
    hf = HFCheckpoint(hf_path)
    hf.check_tied_head()
    roots = (Path(megatron_path), Path(megatron_path).absolute().parent)
    own = any((root / name).exists() for root in roots for name in (RECORD, SIDECAR))
    megatron = MegatronCheckpoint(megatron_path, like=None if own else hf_path)
    problems = [
        f"{megatron.directory / name} is damaged: its SHA-256 is not the one in integrity.json"
        for name in megatron.reader.damaged_files()
    ]
    if megatron.architecture != hf.architecture:
        problems.append(f"{megatron.like}/config.json describes another model than {hf.path}/config.json")
    elif own:
        problems += _different_files(hf.path, megatron.like, dtype)
        expected = record_of(hf, dtype or hf.dtype())
        if read_json(megatron.root / RECORD) != expected:
            problems.append(f"{megatron.root / RECORD} is not {json.dumps(expected)}")
    megatron.architecture = hf.architecture
    structure = megatron.problems()
    problems += structure
    tensors = [] if structure else _compare(hf, megatron, dtype, problems, advance)
    return {
        "hf_path": str(hf.path),
        "megatron_path": str(megatron.path),
        "tensors": tensors,
        "training_state_ignored": len(megatron.training_state()),
        "problems": problems,
    }


def write_report(report: dict, path: Path) -> None:
    """The report as JSON. BadArgument where `path` cannot be written."""
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"the report cannot be written to {path}: {error.strerror}") from None


def _compare(hf: HFCheckpoint, megatron: MegatronCheckpoint, dtype: torch.dtype | None, problems: list[str],
             advance: Callable[[int], object]) -> list[dict]:  # fmt: skip
    rows = []
    for entry in entries(hf.architecture):
        place = places(entry, hf.architecture)[0]
        try:
            converted = megatron.read(entry)
        except RunError as error:
            problems.append(str(error))
            continue
        for name in entry.hf:
            expected, found = hf[name], converted[name]
            if dtype is not None:
                expected = expected.to(dtype)
            left, right = raw_bytes(expected), raw_bytes(found)
            same = expected.dtype == found.dtype and left == right
            digest = hashlib.sha256(left).hexdigest()
            if expected.dtype != found.dtype:
                problems.append(f"{name} is {expected.dtype} in Hugging Face and {found.dtype} in Megatron; "
                                "say --dtype where that was asked for")  # fmt: skip
            elif not same:
                count = int((expected != found).sum()) or "only the bits of some"
                problems.append(
                    f"{name} differs from {place.key}{list(place.index)}: {count} of {found.numel()} values"
                )
            rows.append(
                {
                    "name": name,
                    "megatron": f"{place.key}{list(place.index)}",
                    "shape": list(found.shape),
                    "dtype": str(found.dtype),
                    "sha256_hf": digest,
                    "sha256_megatron": digest if same else hashlib.sha256(right).hexdigest(),
                }
            )
            advance(found.nbytes)
    return rows


def _different_files(hf: Path, carried: Path, dtype: torch.dtype | None) -> list[str]:
    """Problems with the files beside the weights: config, tokenizer, templates. `dtype` may differ in the config."""
    left, right = assets(hf), assets(carried)
    problems = [f"{name} is missing from {carried}" for name in left.keys() - right.keys()]
    problems += [f"{name} in {carried} is not in {hf}" for name in right.keys() - left.keys()]
    for name in sorted(left.keys() & right.keys()):
        if left[name].read_bytes() == right[name].read_bytes():
            continue
        if name == "config.json" and dtype is not None and _same_but_dtype(left[name], right[name]):
            continue
        problems.append(f"{name} differs between {hf} and {carried}")
    return problems


def _same_but_dtype(left: Path, right: Path) -> bool:
    a, b = read_json(left), read_json(right)
    return {k: v for k, v in a.items() if "dtype" not in k} == {k: v for k, v in b.items() if "dtype" not in k}
