"""How much memory a pool may take, and what is there: the sizing of the KV pool at start.

Owns: the budget's rules, reading free memory, and the sentences of a start that does not fit. Must not know: what the
pool holds, models. Everything is of one process and its one device.

On CPU what is free is the system's own estimate, or what the control group has left, if that is less; a step then also
copies the blocks of one layer (services.engine.kv_pool), which is set aside. On CUDA it is what the driver reports once
the weights are loaded and a step of the largest size has run, so that they, its workspace and other processes count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from services.common.errors import ConfigError

MIB = 1 << 20

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass(frozen=True, slots=True)
class PoolBudget:
    """What was asked for, the first that is set: `num_blocks`, `share` of what is free, `num_bytes`."""

    num_blocks: int
    share: float
    num_bytes: int

    @property
    def setting(self) -> str:
        """The setting that decides."""
        return "num_blocks" if self.num_blocks else "kv_memory_share" if self.share else "kv_memory_mb"


@dataclass(frozen=True, slots=True)
class PoolSize:
    """What a budget comes to."""

    num_blocks: int
    num_bytes: int
    free_bytes: int
    """What was free before the pool."""


def size_pool(budget: PoolBudget, block_bytes: int, num_layers: int, free_bytes: int, device: torch.device) -> PoolSize:
    """How many blocks of `block_bytes` (all layers together) the budget gives.

    Raises ConfigError, naming the setting, where it holds no block or is more than is free.
    """
    # A step on CPU gathers one layer's keys and values at a time.
    reserve = 1 / num_layers if device.type == "cpu" else 0.0
    if budget.num_blocks:
        num_blocks = budget.num_blocks
    else:
        num_bytes = int(budget.share * free_bytes / (1 + reserve)) if budget.share else budget.num_bytes
        num_blocks = num_bytes // block_bytes
    if not num_blocks:
        raise ConfigError(
            f"{budget.setting}: {num_bytes / MIB:.2f} MiB hold no block of the KV pool; one takes "
            f"{block_bytes / MIB:.2f} MiB"
        )
    size = PoolSize(num_blocks, num_blocks * block_bytes, free_bytes)
    if size.num_bytes * (1 + reserve) > free_bytes:
        raise does_not_fit(budget, size.num_bytes, device, f"{free_bytes / MIB:.0f} MiB are free")
    return size


def does_not_fit(budget: PoolBudget, num_bytes: int, device: torch.device, reason: str) -> ConfigError:
    """The error of a pool that cannot be had."""
    return ConfigError(
        f"{budget.setting}: a KV pool of {num_bytes / MIB:.0f} MiB does not fit beside the weights on {device}: "
        f"{reason}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on `device`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def free_host_memory(meminfo: Path = _MEMINFO, cgroups: tuple[tuple[Path, Path], ...] = _CGROUPS) -> int:
    """Bytes that can be had without swapping: MemAvailable, or less where a control group (v2 or v1) has less left."""
    free = [_available(meminfo)]
    for limit_file, usage_file in cgroups:
        try:
            limit, usage = limit_file.read_text().strip(), usage_file.read_text().strip()
        except OSError:
            continue
        if limit != "max":
            free.append(max(0, int(limit) - int(usage)))
    return min(free)


def _available(meminfo: Path) -> int:
    """MemAvailable in bytes; on a system without it, half of what there is."""
    import os

    try:
        lines = meminfo.read_text().splitlines()
        (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(kibibytes) << 10


def module_bytes(module: torch.nn.Module) -> int:
    """Memory of a module's parameters and buffers: of sharded ones this rank's part, of quantised ones as stored.

    Weights that are no tensors are counted by their modules, as `packed_bytes`.
    """
    packed = sum(getattr(part, "packed_bytes", 0) for part in module.modules())
    return packed + sum(_stored_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _stored_bytes(tensor: torch.Tensor) -> int:
    """A wrapper (a sharded or a quantised tensor) says itself what it consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    parts = (getattr(tensor, name) for name in names)
    return sum(_stored_bytes(part) for part in parts if isinstance(part, torch.Tensor))
