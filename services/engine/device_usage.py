"""How much of its device a worker uses: memory and utilisation.

Owns: asking the system, or torch and through it the driver. Must not know: who wants to know, metrics. Safe from any
thread: nothing here waits for the device's work. torch is loaded for CUDA only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from services.common.values import DeviceUsage

_STATM = Path("/proc/self/statm")


def device_usage_of(device: str) -> Callable[[], DeviceUsage]:
    """What asks for the usage of a device, named as in the configuration."""
    return cuda_usage if device.startswith("cuda") else host_usage


def host_usage(statm: Path = _STATM) -> DeviceUsage:
    """Memory of this process, and of the machine. Zeros on a system that does not tell."""
    try:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        num_resident_pages = int(statm.read_text().split()[1])
        return DeviceUsage(num_resident_pages * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes)
    except (OSError, ValueError, IndexError):
        return DeviceUsage()


def cuda_usage() -> DeviceUsage:
    """Of the process's own device, as the driver counts it, of all processes."""
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return DeviceUsage(total_bytes - free_bytes, total_bytes)


def utilisation_of(device: str) -> Callable[[], float | None]:
    """What asks for the share of time in which a device computed."""
    return cuda_utilisation if device.startswith("cuda") else unknown_utilisation


def cuda_utilisation() -> float | None:
    """Where NVML's bindings are installed."""
    import torch

    try:
        return torch.cuda.utilization() / 100
    except (ModuleNotFoundError, RuntimeError):
        return None


def unknown_utilisation() -> float | None:
    """Of a device whose driver does not say."""
    return None
