"""Hand device memory back while its contents wait in host memory, so that colocated servers can use it."""

from collections.abc import Callable, Iterable

import torch


class OffloadedStorages:
    """Storages that are on their device or, between `offload` and `restore`, in host memory.

    Tensors and views keep their identity: a parameter, its slice in the optimizer and its place in a gradient buffer
    share one storage, which only loses its bytes for a while. Nothing may touch them meanwhile.

    Args:
        tensors: Returns the tensors to offload; called each time, because Adam makes its moments at the first step.
        contents: Whether to keep the bytes; not if they are overwritten before they are read.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], contents: bool = True):
        self._tensors, self._contents = tensors, contents
        self._hosts: dict[int, torch.Tensor] = {}  # kept for the next time: pinning memory takes longer than copying
        self._offloaded: list[tuple[torch.UntypedStorage, int]] = []

    def offload(self) -> None:
        """Free the device memory. Storages that are offloaded already stay so."""
        found = _storages(self._tensors())
        self._hosts = {key: host for key, host in self._hosts.items() if key in found}
        # One that numpy has looked at, which happens on CPU alone, can never be resized again: it stays.
        storages = [storage for storage in found.values() if storage.nbytes() and storage.resizable()]
        if self._contents:
            for storage in storages:
                self._host(storage).copy_(_bytes(storage), non_blocking=True)
        _synchronize()  # the copies above, and whatever still reads what is about to be freed
        for storage in storages:
            self._offloaded.append((storage, storage.nbytes()))
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Allocate the device memory again, with its contents."""
        for storage, size in self._offloaded:
            storage.resize_(size)
            if self._contents:
                _bytes(storage).copy_(self._host(storage), non_blocking=True)
        self._offloaded.clear()
        _synchronize()

    def _host(self, storage: torch.UntypedStorage) -> torch.Tensor:
        host = self._hosts.get(storage._cdata)
        if host is None or len(host) != storage.nbytes():
            pinned = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            self._hosts[storage._cdata] = host
        return host


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages behind `tensors`, each once, by identity."""
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def without(tensors: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the `tensors` that share no storage with `others`."""
    taken = _storages(others)
    return [t for t in tensors if t.untyped_storage()._cdata not in taken]


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
