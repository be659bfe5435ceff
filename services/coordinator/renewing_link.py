"""A link that moves to a new channel when the certificates change, while what runs on the old one goes on.

Owns: when a successor is made, and when its predecessor is let go. Must not know: items, files, TLS.

    version of `channels` grows ──▶ a second link connects ──▶ up: it takes all new sequences
                                                                  the old one ends when its last sequence does
                                    not up in time: it is given up, the old one stays, and the next is tried later

A link that loses its connection comes back with the newest certificates by itself; this is for those that do not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from services.common.channels import Channels
from services.common.errors import OutriderError
from services.common.items import DraftItem, DraftResult, Identity, TargetItem, TargetResult
from services.common.service import end_tasks
from services.common.values import WorkerInfo, WorkerLoad
from services.coordinator.worker_link import Codec, Lane, WorkerLink

log = logging.getLogger(__name__)
ItemT = TypeVar("ItemT", bound=TargetItem | DraftItem)
ResultT = TypeVar("ResultT", bound=TargetResult | DraftResult)

_LOOK_S = 1.0
_CONNECT_S = 10.0


class RenewingLink(Generic[ItemT, ResultT]):
    """services.coordinator.link.Link over one or, for a while, several WorkerLinks. Used by one event loop."""

    def __init__(
        self, address: str, codec: Codec[ItemT, ResultT], channels: Channels, *, look_s: float = _LOOK_S
    ) -> None:
        """`look_s`: seconds between looks at the certificates, and at old links that may be let go."""
        self.address = address
        self._channels = channels
        self._look_s = look_s
        self._codec = codec
        self.on_change: Callable[[], None] = lambda: None
        self.on_broken: Callable[[], None] = lambda: None
        self._link = self._new_link()
        self._version = channels.version
        self._old: list[WorkerLink[ItemT, ResultT]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def __str__(self) -> str:
        return str(self._link)

    @property
    def info(self) -> WorkerInfo | None:
        return self._link.info

    @property
    def load(self) -> WorkerLoad:
        return self._link.load

    @property
    def num_foreign(self) -> int:
        """What drains on old links is this coordinator's own as well."""
        return max(0, self._link.num_foreign - sum(link.num_lanes for link in self._old))

    @property
    def up(self) -> bool:
        return self._link.up

    @property
    def trouble(self) -> OutriderError:
        return self._link.trouble

    @property
    def num_draining(self) -> int:
        """Old links whose sequences have not ended yet."""
        return len(self._old)

    def start(self) -> None:
        self._link.start()
        self._tasks = [asyncio.create_task(self._renew())]

    async def aclose(self) -> None:
        await end_tasks(*self._tasks)
        for link in (self._link, *self._old):
            await link.aclose()

    async def wait_up(self, timeout_s: float) -> bool:
        return await self._link.wait_up(timeout_s)

    async def describe(self, timeout_s: float) -> WorkerInfo:
        return await self._link.describe(timeout_s)

    def open_lane(self, identity: Identity) -> Lane[ItemT, ResultT]:
        return self._link.open_lane(identity)

    def _new_link(self) -> WorkerLink[ItemT, ResultT]:
        """Of which only the present one is heard."""
        link = WorkerLink(self.address, self._codec, self._channels)
        link.on_change = lambda: self.on_change() if link is self._link else None
        link.on_broken = lambda: self.on_broken() if link is self._link else None
        return link

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            if (version := self._channels.version) != self._version:
                await self._connect_anew(version)
            for link in [link for link in self._old if not link.num_lanes]:
                self._old.remove(link)
                await link.aclose()

    async def _connect_anew(self, version: int) -> None:
        successor = self._new_link()
        successor.start()
        try:
            if not await successor.wait_up(_CONNECT_S):
                log.warning("%s: no connection with the changed certificates yet: %s", self, successor.trouble)
                return
            self._old.append(self._link)
            self._link, self._version = successor, version
            log.info("%s: connected with the changed certificates", self)
            self.on_change()
        finally:
            if self._link is not successor:
                await successor.aclose()
