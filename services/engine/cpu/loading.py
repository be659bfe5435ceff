"""Compiles the kernels for short steps, once for each type and processor.

Owns: whether there are any, and where the compiled ones are kept. Must not know: what they compute. Where Numba is not
installed or cannot compile, torch computes everything, as it does long steps.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from services.common.config import cache_dir
from services.engine.cpu.team import find_team

if TYPE_CHECKING:
    from services.engine.cpu.kernels import Kernels

log = logging.getLogger(__name__)

_STORED: dict[torch.dtype, type[np.generic]] = {torch.float32: np.float32, torch.bfloat16: np.uint16}


@functools.cache
def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """For a model that computes in `dtype` on a CPU; None: torch has to do. The first time they take seconds."""
    if dtype not in _STORED:
        return None
    try:
        import numba

        from services.engine.cpu.kernels import compile_kernels
    except ImportError as error:
        log.warning("short steps are slower than they could be: %s (pip install 'outrider[engine]')", error)
        return None
    directory = _directory()
    if directory is not None:
        numba.config.CACHE_DIR = str(directory)
    return compile_kernels(_STORED[dtype], directory is not None, find_team())


def _directory() -> Path | None:
    """Where compiled kernels are kept; None where nothing can be written."""
    directory = cache_dir() / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
    except OSError:
        return None
    return directory
