"""Looks into Redis while clients stream: what a client has must be stored, and who lost a session must not write to it.

Owns: these two checks, past all proxies. Must not know: clients, how faults are done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class Holders(NamedTuple):
    """The lease that a session is under, and the instances of its coordinator and its workers."""

    lease_epoch: int
    instance_ids: frozenset[str]


class Watch:
    """`num_early`: tokens that a client had before the record did, outside of an outage of Redis. `num_stale_writes`:
    writes under an earlier lease that were taken."""

    def __init__(self, port: int) -> None:
        self._redis = Redis(port=port, socket_timeout=5.0, socket_connect_timeout=5.0, decode_responses=True)
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

    async def holders(self, session_ids: Sequence[str]) -> dict[str, Holders]:
        """Who has these sessions, as far as there are records."""
        found: dict[str, Holders] = {}
        with contextlib.suppress(RedisError, OSError):
            for session_id in session_ids:
                fields = ["lease_epoch", "owner_id", "target_handle", "draft_handle"]
                values = await self._redis.hmget(_meta_key(session_id), fields)
                epoch, *instances = [str(value or "") for value in values]
                if instances[0]:
                    ids = frozenset(instance.partition(" ")[0] for instance in instances)
                    found[session_id] = Holders(int(epoch), ids)
        return found

    async def write_late(self, earlier: Mapping[str, Holders]) -> None:
        """For each session that has changed hands since then: a write under the old lease arrives only now, as from a
        network that had held it back. It fits what is stored; the lease alone says that it is late."""
        with contextlib.suppress(RedisError, OSError, OutriderError):
            for session_id, holders in earlier.items():
                owner_id, epoch = await self._redis.hmget(_meta_key(session_id), ["owner_id", "lease_epoch"])
                if owner_id and epoch and int(epoch) > holders.lease_epoch:
                    await self._write(session_id, str(owner_id), holders.lease_epoch)

    async def _write(self, session_id: str, owner_id: str, epoch: int) -> None:
        store = SessionStore(self._redis, owner_id, idle_s=3600, tombstone_s=3600)
        length = await self._redis.strlen(f"outrider:{{{session_id}}}:tokens") // 4
        outcomes = await store.write_all([Commit(session_id, epoch, length, (_WRONG_TOKEN,), b"\x02")])
        self.num_late_writes += 1
        self.num_stale_writes += outcomes == [None]


def _meta_key(session_id: str) -> str:
    return f"outrider:{{{session_id}}}:meta"
