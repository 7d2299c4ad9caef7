"""Training checkpoints: weights, optimizer, schedule, the objective's history, teacher; megatron-core's sharded format.

A run that trains an adapter saves the adapter in place of the weights, which model.path holds.

A checkpoint is a directory step_NNNNNN. It is written under another name, in the background if asked to, and renamed
when every rank has finished, so it is complete or it is not there; SHA-256 sums of all its files tell later whether it
still is what was written. Any layout can load it, with the same kind of optimizer (distributed or not). Nothing else
needs saving: the order of the problems follows from seed and step, the frozen teacher from model.path, and training
draws no random numbers (there is no dropout).
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from megatron_egrsd.engine import adapter_checkpoint, training_state
from megatron_egrsd.engine.checkpoint_writer import CheckpointWriter
from megatron_egrsd.engine.distributed import lost_contact, on_first_rank
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.hf import integrity
from megatron_egrsd.hf.safe_pickle import check_metadata
from megatron_egrsd.system.files import PARTIAL, write_text

METRICS_FILE = "metrics.jsonl"  # the run's metrics up to the checkpoint's step
_BEST = "best"  # names the checkpoint of the best evaluation
_NAME = r"step_\d+"
_LITTLE = 1 << 20  # free bytes below which a disk counts as full


# torch's is no Exception but a BaseException.
_FAILURES = (dist_checkpointing.core.CheckpointingException, torch.distributed.checkpoint.CheckpointException)


def complete(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory` that were written to the end, the newest first."""
    found = [p for p in directory.glob("step_*") if re.fullmatch(_NAME, p.name)] if directory.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def later(directory: Path, step: int) -> list[Path]:
    """Return the checkpoints in `directory` of steps after `step`, with the name of the best one if it is one of them.

    A run that continues from `step` makes these anew, and a name that is there would not be written again.
    """
    found = [path for path in complete(directory) if step_of(path) > step]
    best = _read(directory / _BEST)
    return found + [directory / _BEST for path in found if path.name == best]


def save(
    engine: Engine,
    directory: Path,
    step: int,
    keep: int,
    history: dict[str, Any],
    metrics_file: Path | None = None,
    best: bool = False,
    run_facts: dict[str, Any] | None = None,
    *,
    background: bool = False,
) -> "Saving":
    """Write `directory`/step_NNNNNN, then remove all but the newest `keep` and the best one. Collective.

    Args:
        history: The objective's history after the steps, `History` as plain values.
        metrics_file: It becomes part of the checkpoint under the name METRICS_FILE, as it is now.
        best: This is the best checkpoint so far; it stays until a later one is.
        run_facts: Plain values that `read_run_facts` returns before anything is loaded.
        background: Return when the state is copied to host memory. The caller publishes what is returned, before it
            saves again. Otherwise it is published here.

    Raises:
        RunError: It could not be written; what was there before is still there.
    """
    path = _path(directory, step)
    saving = Saving(path, keep, best)
    if on_first_rank(path.exists):  # saved already, at the end of the step; then a signal came
        return saving

    def prepare() -> None:
        for left in directory.glob(f"step_*{PARTIAL}"):  # of a start that was killed
            shutil.rmtree(left, ignore_errors=True)
        saving.partial.mkdir(parents=True)
        if metrics_file is not None and metrics_file.is_file():
            saving.metrics = metrics_file.read_bytes()

    with _as_run_error(f"{path} could not be written", directory):
        on_first_rank(prepare)
        state = training_state.sharded(engine, step, history, loading=False)
        state |= {"notes": json.dumps(run_facts or {}), "adapter": _adapter(engine)}  # the name in all versions
        saving.writer = CheckpointWriter(state, saving.partial, background=background)
    if not background:
        saving.publish()
    return saving


def name_best(directory: Path, step: int) -> None:
    """Make the checkpoint of `step` the best one, if it is there already. Not collective."""
    path = _path(directory, step)
    if path.exists():
        write_text(directory / _BEST, path.name)


def _path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


class Saving:
    """A checkpoint that is being saved; `publish` gives it its name, `path`. Every rank makes the same calls."""

    def __init__(self, path: Path, keep: int, best: bool):
        self.path, self.keep, self.best = path, keep, best
        self.writer: CheckpointWriter | None = None  # None if the checkpoint was there before
        self.metrics: bytes | None = None  # on rank 0, the content of METRICS_FILE

    @property
    def partial(self) -> Path:
        """The directory's name until all is written."""
        return self.path.with_name(self.path.name + PARTIAL)

    def written(self) -> bool:
        """Return whether `publish` would not wait, because every rank has written its files or failed. Collective."""
        return self.writer is None or self.writer.written()

    def wait(self) -> None:
        """Block until this rank writes no more; what was written keeps its temporary name. Not collective."""
        if self.writer is not None:
            self.writer.wait()

    def publish(self) -> None:
        """Wait until all is written, give it its name, and remove older checkpoints. Collective.

        Raises:
            RunError: A rank could not write; what was there before is still there.
        """
        if self.writer is not None:
            with _as_run_error(f"{self.path} could not be written", self.path.parent):
                on_first_rank(self._write_metrics)  # before the sums are
                self.writer.finish()
                on_first_rank(self._rename)

    def _write_metrics(self) -> None:
        if self.metrics is not None:
            (self.partial / METRICS_FILE).write_bytes(self.metrics)

    def _rename(self) -> None:
        directory = self.path.parent
        self.partial.rename(self.path)
        if self.best:
            write_text(directory / _BEST, self.path.name)
        found = complete(directory)
        kept = {path.name for path in found[: self.keep]} | {_read(directory / _BEST)}
        for old in found:
            if old.name not in kept:  # a checkpoint that is half removed has no final name either
                old = old.rename(old.with_name(old.name + PARTIAL))
                shutil.rmtree(old, ignore_errors=True)  # what a process still has open goes before the next save


@contextlib.contextmanager
def _as_run_error(what: str, directory: Path) -> Iterator[None]:
    """Put an error of the disk, or of megatron-core about the disk, into a sentence; let one of the network through."""
    try:
        yield
    except RunError:
        raise
    except (OSError, RuntimeError, *_FAILURES) as error:
        if lost_contact(error):
            raise
        raise RunError(f"{what}: {_full(directory) or _reason(error)}") from error


def _full(directory: Path) -> str:
    """Return a sentence if the disk of `directory` is full: torch says then that it is at another place in the file."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(directory).free
        if free < _LITTLE:
            return f"no space left on its disk ({free >> 10} KiB are free)"
    return ""


def _reason(error: BaseException) -> str:
    """Return the last line of what it says: torch puts the traceback of a rank before it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def check(path: Path) -> None:
    """Raise BadArgument if a file of the checkpoint `path` is missing, differs from what was written, or holds code."""
    if not re.fullmatch(_NAME, path.name) or not (path / "metadata.json").is_file():
        raise BadArgument(f"{path} is not a checkpoint: a directory step_NNNNNN with metadata.json in it")
    try:
        wrong = integrity.differing(path)
        if wrong.get(METRICS_FILE) == integrity.UNLISTED:  # of an older version
            del wrong[METRICS_FILE]
        if wrong:
            raise ValueError(" ".join(min(wrong.items())))
        check_metadata((path / ".metadata").read_bytes())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadArgument(f"the checkpoint {path} is damaged: {' '.join(str(error).split())[:300]}") from None


def find(directory: Path, wanted: str) -> Path | None:
    """Return the checkpoint to continue from, checked: `wanted`, or for "auto" the newest intact one of `directory`.

    Damaged ones are passed over with a word. None if "auto" finds no checkpoint at all.

    Raises:
        BadArgument: `wanted` is damaged or no checkpoint; or every checkpoint of `directory` is damaged.
    """
    if wanted != "auto":
        check(Path(wanted))
        return Path(wanted)
    found = complete(directory)
    for path in found:
        try:
            check(path)
            return path
        except BadArgument as error:
            print(f"warning: {error}; trying the one before", flush=True)
    if found:
        raise BadArgument(f"every checkpoint in {directory} is damaged, the last one tried being {found[-1]}; "
                          "remove them to start from the beginning")  # fmt: skip
    return None


def read_run_facts(path: Path) -> dict[str, Any]:
    """Return the `run_facts` of a checkpoint that has passed `check`; {} if an older version saved it, without them."""
    with _without_code():
        return json.loads(dist_checkpointing.load_common_state_dict(str(path)).get("notes", "{}"))


def load(engine: Engine, path: Path) -> tuple[int, dict[str, Any]]:
    """Continue from a checkpoint that has passed `check`, saved in any layout. Collective.

    `training_state.restore` says what it brings, and what stays as the engine was configured.

    Returns:
        The checkpoint's step, and `history` as it was saved: {} if an older version saved it, without one.

    Raises:
        BadArgument: `path` does not belong to this model, or to a run that trains the same parameters.
    """
    sharded = engine.parallel.distributed_optimizer
    training_state.prepare_to_load(engine)
    try:
        with _without_code():
            saved = dist_checkpointing.load_common_state_dict(str(path))
            adapter_checkpoint.check(path, saved.get("adapter"), _adapter(engine))
            if (other := saved.get("distributed_optimizer", sharded)) != sharded:
                raise BadArgument(
                    f"{path} was saved with parallel.distributed_optimizer {str(other).lower()}; continue with the same"
                )
            wanted = _without_absent_extra_states(training_state.sharded(engine, 0, {}, loading=True), path)
            state = dist_checkpointing.load(wanted, str(path))
    except _FAILURES as error:
        raise BadArgument(f"{path} does not belong to this model: {_reason(error)}") from None
    training_state.restore(engine, state)
    return state["step"], state.get("rewards") or {}


def _without_absent_extra_states(state: dict, path: Path) -> dict:
    """Return `state` without the extra states (Transformer Engine's FP8 scales) that the checkpoint does not hold.

    Which layers have one depends on their implementation; without one a layer begins with what it has.
    """
    held = load_sharded_metadata(str(path))
    for chunk in state["model"].values():
        for name, part in chunk.items():
            if isinstance(part, ShardedObject) and name.endswith("._extra_state") and part.unique_key not in held:
                chunk[name] = LocalNonpersistentObject(None)
    return state


@contextlib.contextmanager
def _without_code() -> Iterator[None]:
    """Let torch.load take tensors and plain containers alone, whatever megatron-core and torch ask it for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _adapter(engine: Engine) -> dict[str, Any] | None:
    """Return the form of the adapter and the hash of its base; None for a run that trains all weights."""
    return on_first_rank(lambda: adapter_checkpoint.describe(engine.adapter, engine.model_path))
