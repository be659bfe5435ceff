"""torch's own threads, to be used by kernels that are not torch's.

Owns: where the functions of torch's OpenMP runtime lie. Must not know: kernels.

A second pool of threads would share the cores with torch's, which after a product spin for the next one. GNU's, LLVM's
and Intel's runtimes all have these functions, the first under the name that GCC's code calls it by.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch


class Team(NamedTuple):
    """Addresses of functions of C; all 0 where there are none."""

    fork: int
    """void (void (*function)(void *), void *data, unsigned num_threads, unsigned flags): calls `function` in so many
    threads at most, the caller's among them, and waits for all."""
    thread_num: int
    """int (void): which of them this one is."""
    num_threads: int
    """int (void): how many they are."""


NO_TEAM = Team(0, 0, 0)


def find_team() -> Team:
    """Of the runtime that torch is linked with: a search from its library on finds that of all that are loaded."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    except (OSError, AttributeError):
        return NO_TEAM
    return Team(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
