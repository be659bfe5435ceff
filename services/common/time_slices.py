"""How long a thread runs before another one may: short slices let a thread run soon after it wakes.

Owns: the call to the kernel. Must not know: what the thread does.

Linux schedules by earliest virtual deadline (Stoica and Abdel-Wahab 1995), and since 6.12 a thread may ask for another
slice than the default of some milliseconds. The one with shorter slices has the earlier deadline, not the greater
share: it waits less, also where every core is taken by a computation. That is a worker's event loop beside the threads
of its engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator

SHORT_SLICE_NS = 100_000
"""The shortest that Linux grants."""
_SET, _GET = {"x86_64": (314, 315), "aarch64": (274, 275)}.get(platform.machine(), (None, None))
"""The numbers of sched_setattr and sched_getattr, for which the C library has no functions."""


class _Attributes(ctypes.Structure):
    """struct sched_attr in its first version. `runtime_ns` is an ordinary thread's slice."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    ]


@contextlib.contextmanager
def short_slices() -> Iterator[None]:
    """Gives the calling thread short slices, from enter to exit. Where the system has no such thing, nothing changes.

    A thread that starts inside inherits them.
    """
    before = slice_ns()
    if before:
        _set_slice_ns(SHORT_SLICE_NS)
    try:
        yield
    finally:
        if before:
            _set_slice_ns(before)


def slice_ns() -> int:
    """Of the calling thread; 0 where that is unknown or it is scheduled in another way."""
    attributes = _attributes()
    return attributes.runtime_ns if attributes is not None and attributes.policy == os.SCHED_OTHER else 0


def _set_slice_ns(duration_ns: int) -> None:
    attributes = _attributes()
    if attributes is not None:
        attributes.runtime_ns = duration_ns
        _call(_SET, attributes)


def _attributes() -> _Attributes | None:
    attributes = _Attributes()
    return attributes if _call(_GET, attributes, ctypes.sizeof(attributes)) else None


def _call(number: int | None, attributes: _Attributes, *arguments: int) -> bool:
    """For the calling thread; whether it succeeded."""
    if number is None or sys.platform != "linux":
        return False
    attributes.size = ctypes.sizeof(attributes)
    values = [ctypes.c_long(value) for value in (*arguments, 0)]
    succeeded: bool = (
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(0), ctypes.byref(attributes), *values) == 0
    )
    return succeeded
