"""Messages on a pipe: eight bytes of length, then as many bytes.

Owns: that format. Must not know: what the bytes mean.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_LENGTH = struct.Struct("<Q")


def write_frame(pipe: BinaryIO, data: bytes) -> None:
    """Writes one message; the caller flushes."""
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)


def read_frame(pipe: BinaryIO) -> bytes | None:
    """The next message; None at the end of the pipe, also where it ends within a message."""
    prefix = pipe.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(prefix)
    data = pipe.read(length)
    return data if len(data) == length else None
