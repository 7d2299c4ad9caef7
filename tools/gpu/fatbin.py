"""Keep one architecture of a CUDA library: all others' machine code becomes zeros, which compress to nothing.

The section .nv_fatbin of a library is a sequence of containers. A container is a header (magic number, version, size
of the header, size of what follows) and entries; an entry is a header (kind, version, sizes, architecture) and its
payload, PTX or machine code. Sizes and places stay as they are, so that the library loads like the original; the CUDA
driver picks entries by architecture and never reads the payload of another. The layout is not documented by NVIDIA:
what does not look as described here is left alone.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, bytes of the payload, architecture
_CODE = 2  # kind: machine code; 1 is PTX


def keep_architecture(library: Path, architecture: int) -> tuple[int, int]:
    """Zero the code of all architectures but one (90 is sm_90), and all PTX; return the bytes zeroed and kept.

    Raises ValueError, with the file untouched, if nothing would be left.
    """
    data = bytearray(library.read_bytes())
    zeroed = kept = 0
    for kind, found, start, end in _payloads(data):
        if kind == _CODE and found == architecture:
            kept += end - start
        else:
            data[start:end] = bytes(end - start)
            zeroed += end - start
    if zeroed and not kept:
        raise ValueError(f"{library} holds no code for sm_{architecture}")
    library.write_bytes(data)
    return zeroed, kept


def _payloads(data: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Yield (kind, architecture, start, end) of every entry's payload."""
    magic = struct.pack("<I", _MAGIC)
    at = data.find(magic)
    while at >= 0:
        if at + _CONTAINER.size > len(data):
            return
        _, version, header, size = _CONTAINER.unpack_from(data, at)
        begin, end = at + header, at + header + size
        if version != 1 or header != _CONTAINER.size or end > len(data):  # the number by chance
            at = data.find(magic, at + 1)
            continue
        while begin + _ENTRY.size <= end:
            kind, _, header, size, architecture = _ENTRY.unpack_from(data, begin)
            stop = begin + header + size
            if not header or stop > end:
                break
            yield kind, architecture, begin + header, stop
            begin = stop
        at = data.find(magic, end)
