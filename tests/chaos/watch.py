"""Looks into Redis while clients stream: what a client has must be stored, and who lost a session must not write to it.

Owns: these two checks, past all proxies. Must not know: clients, how faults are done.
"""

from __future__ import annotations

import contextlib
import time

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.errors import OutriderError
from services.common.session_record import Commit
from services.common.session_store import SessionStore

_WRONG_TOKEN = 1
"""The simulated model never generates it."""
_CATCHES_UP_S = 6.0
"""From the end of an outage of Redis on, until every record is complete again."""
_EVERY = 8


class Watch:
    """`num_early`: tokens that a client had before the record did, outside of an outage of Redis. `num_stale_writes`:
    writes under an earlier lease that were taken."""

    def __init__(self, port: int) -> None:
        self._redis = Redis(port=port, socket_timeout=5.0, socket_connect_timeout=5.0)
        self._leases: dict[str, int] = {}
        self._calm_from = 0.0
        self._num_chunks = 0
        self.every_chunk = False
        """Look at each chunk; else at some."""
        self.num_looks = self.num_early = 0
        self.num_late_writes = self.num_stale_writes = 0

    async def aclose(self) -> None:
        await self._redis.aclose()

    def outage(self, lasts: bool) -> None:
        """Redis is about to be away, or is back."""
        self._calm_from = float("inf") if lasts else time.monotonic() + _CATCHES_UP_S

    async def look(self, session_id: str, num_tokens: int) -> None:
        """A client has received this many tokens, the prompt included."""
        self._num_chunks += 1
        if time.monotonic() < self._calm_from or (self._num_chunks % _EVERY and not self.every_chunk):
            return
        with contextlib.suppress(RedisError, OSError):
            stored = await self._redis.strlen(f"outrider:{{{session_id}}}:tokens") // 4
            if time.monotonic() >= self._calm_from:
                self.num_looks += 1
                self.num_early += max(0, num_tokens - stored)

    async def note_leases(self, session_ids: list[str]) -> None:
        """Under which lease each session is now."""
        self._leases = {}
        with contextlib.suppress(RedisError, OSError):
            for session_id in session_ids:
                if epoch := await self._redis.hget(f"outrider:{{{session_id}}}:meta", "lease_epoch"):
                    self._leases[session_id] = int(epoch)

    async def write_late(self) -> None:
        """For each session that has changed hands since then: a write under the old lease arrives only now, as from a
        network that had held it back. It fits what is stored; the lease alone says that it is late."""
        with contextlib.suppress(RedisError, OSError, OutriderError):
            for session_id, old_epoch in self._leases.items():
                owner_id, epoch = await self._redis.hmget(
                    f"outrider:{{{session_id}}}:meta", ["owner_id", "lease_epoch"]
                )
                if owner_id and int(epoch) > old_epoch:
                    await self._write(session_id, owner_id.decode(), old_epoch)

    async def _write(self, session_id: str, owner_id: str, epoch: int) -> None:
        store = SessionStore(self._redis, owner_id, idle_s=3600, tombstone_s=3600)
        length = await self._redis.strlen(f"outrider:{{{session_id}}}:tokens") // 4
        outcomes = await store.write_all([Commit(session_id, epoch, length, (_WRONG_TOKEN,), b"\x02")])
        self.num_late_writes += 1
        self.num_stale_writes += outcomes == [None]
