"""The files of one checkpoint: written by every rank from host memory, in the background or at once.

megatron-core plans what a rank writes, and writes it; its own queue of asynchronous saves forks a process that has
CUDA, or needs a package for CUDA. A thread does here: writing, fsync and SHA-256 run outside Python's lock. It takes
part in no collective: the ranks agree on the main thread, where their order is known.
"""

import queue
import threading
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_egrsd.engine.distributed import gather, on_first_rank
from megatron_egrsd.hf import integrity
from megatron_egrsd.system.files import sha256


class CheckpointWriter:
    """Writer of `state` into `directory`, an empty one; made by every rank alike.

    In the background it writes copies in host memory, which are made before this returns: the state may change then,
    and the copies go when they are written. Otherwise this returns when the rank has written its files.
    """

    def __init__(self, state: dict[str, Any], directory: Path, *, background: bool):
        self._directory = directory
        self._sums: dict[str, str] = {}  # of this rank's files, by name
        self._error: Exception | None = None
        # megatron-core would start a process to carry the results of the write, which imports torch: 4 s of CPU a rank.
        # The results come from this process; a queue of its own holds none of a write that has failed.
        filesystem_async._results_queue = queue.Queue()
        self._request = dist_checkpointing.save(state, str(directory), async_sharded_save=True, async_strategy="mcore")
        self._buckets = self._request.async_fn_args[1] if self._request.async_fn else []
        for _, _, (_, tensors) in self._buckets:
            for i, (item, tensor) in enumerate(tensors):
                tensors[i] = item, tensor.to("cpu", copy=background)
        self._thread = threading.Thread(target=self._write, name="checkpoint")  # no daemon: Python waits for its end
        self._thread.start()
        if not background:
            self._thread.join()

    def _write(self) -> None:
        try:
            if self._buckets:
                self._request.async_fn(*self._request.async_fn_args)  # puts most errors where `finish` finds them
            for path, name, (data, tensors) in self._buckets:
                data.clear()
                tensors.clear()
                self._sums[name] = sha256(Path(path))
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Block until this rank has written its files, or failed to. Not collective."""
        self._thread.join()

    def written(self) -> bool:
        """Return whether every rank has written its files, or failed to. Collective."""
        return not any(gather(self._thread.is_alive()))

    def finish(self) -> None:
        """Complete the directory with megatron-core's records and the sums of all files, after `wait`. Collective.

        Raises OSError, RuntimeError, or the checkpoint exceptions of torch and megatron-core, if a rank failed.
        """
        self.wait()
        for finalize in self._request.finalize_fns:
            finalize()
        outcomes = gather((self._sums, self._error))
        for _, error in outcomes:
            if error is not None:
                raise error
        on_first_rank(lambda: self._write_sums({name: value for sums, _ in outcomes for name, value in sums.items()}))

    def _write_sums(self, sums: dict[str, str]) -> None:
        records = (file for file in self._directory.iterdir() if file.name not in sums)
        sums |= {file.name: sha256(file) for file in records}
        integrity.write(self._directory, sums)
