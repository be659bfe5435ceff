"""Moving small results off the device, and host values onto it.

Owns: one transfer for any number of tensors, and pinned memory at its host's end. Must not know: what they mean.
Only `to_host` waits for the device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_host(tensors: list[Tensor]) -> list[npt.NDArray[np.float64]]:
    """All tensors in host memory, by a single transfer. Float64 holds every token id, flag and float32 exactly."""
    packed = _fetch(torch.cat([tensor.detach().double().flatten() for tensor in tensors])).numpy()
    offsets = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(packed, offsets), tensors, strict=True)]


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor; unsigned 64-bit numbers keep their bits."""
    if values.dtype == np.uint64:
        values = values.view(np.int64)
    return pinned(values, device).to(device, non_blocking=True)


def pinned(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor that can be copied to `device` without waiting: torch keeps it until the copy is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _fetch(packed: Tensor) -> Tensor:
    if packed.device.type != "cuda":
        return packed
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(packed.device))
    arrived.synchronize()
    return host
