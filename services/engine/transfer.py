"""Moving small results off the device, and host values onto it.

Owns: one transfer for any number of tensors. Must not know: what they mean.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_host(tensors: list[Tensor]) -> list[npt.NDArray[np.float64]]:
    """All tensors in host memory, by a single transfer. Float64 holds every token id, flag and float32 exactly."""
    packed = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu().numpy()
    offsets = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(packed, offsets), tensors, strict=True)]


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor; unsigned 64-bit numbers keep their bits."""
    if values.dtype == np.uint64:
        values = values.view(np.int64)
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
