"""The process group of the ranks of one model: who joins, over which library, on loopback only.

Owns: torch.distributed's initialisation. Must not know: models, steps, how ranks are started.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

ADDRESS = "127.0.0.1"
TIMEOUT = timedelta(minutes=5)
"""Longest that ranks wait for each other in one collective call; a rank that ended is noticed at once."""

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def open_store(size: int) -> TCPStore:
    """Rank 0's meeting point, on a free port of loopback (`store.port`)."""
    return TCPStore(ADDRESS, 0, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False)


def join_store(port: int, size: int) -> TCPStore:
    """The meeting point as the other ranks see it."""
    return TCPStore(ADDRESS, port, size, is_master=False, timeout=TIMEOUT)


def announce(store: Store, rank: int) -> None:
    """Tells rank 0 that this rank is there."""
    store.set(_key(rank), "here")


def have_announced(store: Store, size: int) -> bool:
    """Whether all ranks but rank 0 are there. Does not wait."""
    return bool(store.check([_key(rank) for rank in range(1, size)]))


def _key(rank: int) -> str:
    return f"outrider/rank/{rank}"


def join(store: Store, rank: int, size: int, device: torch.device) -> None:
    """Makes this process a rank of the group; waits for all ranks."""
    os.environ["LOCAL_RANK"] = str(rank)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        _BACKENDS[device.type],
        store=store,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


def least(value: int, device: torch.device) -> int:
    """The smallest of all ranks' values."""
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)
