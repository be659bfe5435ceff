"""The session record in Redis: tokens, who owns the session, and what its last generation was.

Owns: the record's keys, and the fence: every write is a compare-and-set on owner_id, lease_epoch and stored length
(services.common.session_scripts). Must not know: workers, gRPC, how tokens come to be.

    outrider:{session_id}:meta         hash: the fields of SessionRecord
    outrider:{session_id}:tokens       uint32, little-endian
    outrider:{session_id}:origins      one byte a token, 0 = prompt
    outrider:{session_id}:log_probs    rows of the last generation, as the coordinator packs them
    outrider:coordinator:<owner_id>    present while that coordinator lives
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from services.common import redis_client
from services.common import session_scripts as scripts
from services.common.errors import Aborted, ConfigError, FailedPrecondition, NotFound, OutriderError, Unavailable
from services.common.session_record import (
    ANONYMOUS,
    PROMPT_ORIGIN,
    Acquisition,
    Commit,
    KvHandle,
    RecordLost,
    RecordMoved,
    Restoration,
    SessionRecord,
    Write,
    decode_record,
    pack_token_ids,
    unpack_token_ids,
)

__all__ = [
    "ANONYMOUS",
    "PROMPT_ORIGIN",
    "Acquisition",
    "Commit",
    "KvHandle",
    "RecordLost",
    "RecordMoved",
    "Restoration",
    "SessionRecord",
    "SessionStore",
    "Write",
    "pack_token_ids",
    "unpack_token_ids",
]

DEAD_AFTER_S = 1.5
"""Without a sign of life for this long a coordinator counts as dead."""

_EVICTS = ("allkeys-", "volatile-")
_DIGESTS = {
    script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    for script in (scripts.ACQUIRE, scripts.COMMIT, scripts.RESTORE, scripts.FENCE, scripts.CLOSE)
}

Outcome = OutriderError | RecordLost | None
"""Of a write: None if it is stored."""


class SessionStore:
    """Reads and writes session records in the name of one owner. Safe for concurrent use by one event loop.

    Every method raises Unavailable STORE_UNAVAILABLE when Redis cannot be reached; nothing is retried here.
    """

    def __init__(
        self,
        redis: Redis,
        owner_id: str,
        *,
        idle_s: int,
        tombstone_s: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._owner_id = owner_id
        self._idle_s = idle_s
        self._tombstone_s = tombstone_s
        self._clock = clock
        self._failed_at = -DEAD_AFTER_S

    @classmethod
    def connect(cls, url: str, owner_id: str, *, idle_s: int, tombstone_s: int, timeout_s: float = 2.0) -> SessionStore:
        """Opens no connection yet; each operation does when it needs one, and gives up after `timeout_s`.

        Raises ConfigError for a `url` of no known form; see services.common.redis_client.
        """
        return cls(redis_client.connect(url, timeout_s), owner_id, idle_s=idle_s, tombstone_s=tombstone_s)

    @property
    def owner_id(self) -> str:
        return self._owner_id

    @property
    def redis(self) -> Redis:
        """For what else is kept beside the records."""
        return self._redis

    async def aclose(self) -> None:
        await redis_client.close(self._redis)

    async def check_server(self) -> None:
        """Raises ConfigError on a Redis that may evict records: a session ends by expiry or closing alone."""
        try:
            memory = await self._redis.info("memory")
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        if policy.startswith(_EVICTS):
            raise ConfigError(
                f"redis_url: the server's maxmemory-policy is {policy}, which evicts; set it to noeviction"
            )

    async def heartbeat(self, ttl_ms: int) -> None:
        """Says that this owner lives, for `ttl_ms` from now on."""
        try:
            await self._redis.set(_heartbeat_key(self._owner_id), b"1", px=ttl_ms)
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    async def is_alive(self, owner_id: str) -> bool:
        """Whether that coordinator's heartbeat is there, or could not be: right after an outage everybody lives."""
        try:
            there = bool(await self._redis.exists(_heartbeat_key(owner_id)))
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        return there or self._clock() < self._failed_at + DEAD_AFTER_S

    async def load(self, session_id: str, owner_key: str = ANONYMOUS) -> SessionRecord | None:
        """The session's record as of one moment; None if there is none.

        Raises FailedPrecondition SESSION_CLOSED where a tombstone stands, NotFound UNKNOWN_SESSION where record or
        tombstone belong to another key's owner.
        """
        meta_key, *value_keys = _keys(session_id)
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hgetall(meta_key)
                pipeline.mget(value_keys)
                pipeline.ttl(meta_key)
                meta, (token_ids, origins, log_probs), ttl_s = await pipeline.execute()
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        if not meta:
            return None
        fields = {name.decode(): value.decode() for name, value in meta.items()}
        if fields.get("owner_key", ANONYMOUS) != owner_key:
            raise unknown_session(session_id)
        if "closed" in fields:
            raise _closed(session_id)
        return decode_record(session_id, fields, token_ids or b"", origins or b"", log_probs or b"", max(0, ttl_s))

    async def acquire(self, acquisition: Acquisition) -> int:
        """Makes this owner the session's, and returns its new lease_epoch: max(stored + 1, least, Redis time in ms).

        Raises Aborted SESSION_BUSY if the epoch is not the expected one: somebody else took the session meanwhile; and
        RecordMoved if the length is not, for its owner has gone on: load the record again.
        """
        a = acquisition
        arguments: list[str | bytes | int] = [
            self._owner_id,
            "" if a.expected_epoch is None else str(a.expected_epoch),
            a.least_epoch,
            self._idle_s,
            "" if a.expected_len is None else a.expected_len,
            a.num_kept_tokens,
            pack_token_ids(a.token_ids),
            a.origins,
            a.num_kept_log_prob_bytes,
            a.log_probs,
        ]
        for name, value in a.fields.items():
            arguments += (name, value)
        status, number = await self._evaluate(scripts.ACQUIRE, a.session_id, arguments)
        if status == scripts.STALE:
            raise _busy(a.session_id)
        _raise_for(status, a.session_id)
        return number

    async def fence(self, session_id: str, expected_epoch: int) -> None:
        """Makes this owner that of a running generation, all of it kept: what is loaded next stays as it is.

        Does nothing to one that has finished. Raises Aborted SESSION_BUSY if the epoch is not the expected one.
        """
        status, _ = await self._evaluate(scripts.FENCE, session_id, [self._owner_id, expected_epoch])
        if status == scripts.STALE:
            raise _busy(session_id)
        _raise_for(status, session_id)

    async def write_all(self, writes: Sequence[Write]) -> list[Outcome]:
        """Writes all in order, in one round trip; the outcome of each, None meaning that it is stored.

        Sending the same again is harmless. Outcomes: Aborted OWNERSHIP_LOST (another owner or epoch, or the record is
        not what the commit builds upon), FailedPrecondition SESSION_CLOSED, RecordLost.
        """
        replies = await self._write_pipeline(writes)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            await self._load_scripts()
            for i, reply in zip(unknown, await self._write_pipeline([writes[i] for i in unknown]), strict=True):
                replies[i] = reply
        for reply in replies:
            if isinstance(reply, Exception):  # of a server that loads, is full or is a replica now: later, not never
                raise self._unavailable(reply)
        return [_outcome(write, reply) for write, reply in zip(writes, replies, strict=True)]

    async def close(self, session_id: str, owner_key: str = ANONYMOUS) -> None:
        """Leaves a tombstone in the session's place. Idempotent while it stands.

        Raises NotFound UNKNOWN_SESSION, also where it belongs to another key's owner.
        """
        status, _ = await self._evaluate(scripts.CLOSE, session_id, [self._tombstone_s, owner_key, ANONYMOUS])
        _raise_for(status, session_id)

    async def _write_pipeline(self, writes: Sequence[Write]) -> list[object]:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for write in writes:
                    script, arguments = self._write_arguments(write)
                    extra = [part for pair in write.fields.items() for part in pair]
                    pipeline.execute_command(
                        "EVALSHA", _DIGESTS[script], 4, *_keys(write.session_id), *arguments, *extra
                    )
                return list(await pipeline.execute(raise_on_error=False))
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _write_arguments(self, write: Write) -> tuple[str, tuple[str | bytes | int, ...]]:
        owner = self._owner_id, write.lease_epoch
        if isinstance(write, Restoration):
            values = write.packed_token_ids, write.origins, write.log_probs
            return scripts.RESTORE, (*owner, self._idle_s, *values)
        values = pack_token_ids(write.token_ids), write.origins, write.log_probs
        return scripts.COMMIT, (*owner, write.base_len, self._idle_s, *values)

    async def _evaluate(self, script: str, session_id: str, arguments: list[str | bytes | int]) -> tuple[int, int]:
        keys_and_arguments = (*_keys(session_id), *arguments)
        try:
            try:
                reply = await self._redis.evalsha(_DIGESTS[script], 4, *keys_and_arguments)
            except NoScriptError:
                await self._load_scripts()
                reply = await self._redis.evalsha(_DIGESTS[script], 4, *keys_and_arguments)
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        return int(reply[0]), int(reply[1])

    async def _load_scripts(self) -> None:
        try:
            for script in _DIGESTS:
                await self._redis.script_load(script)
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        self._failed_at = self._clock()
        return Unavailable(
            "STORE_UNAVAILABLE", f"the session store cannot be reached: {type(error).__name__}", retry_after_ms=1000
        )


def _keys(session_id: str) -> tuple[str, str, str, str]:
    base = f"outrider:{{{session_id}}}:"
    return base + "meta", base + "tokens", base + "origins", base + "log_probs"


def _heartbeat_key(owner_id: str) -> str:
    return f"outrider:coordinator:{owner_id}"


def _outcome(write: Write, reply: object) -> Outcome:
    status = int(reply[0])  # type: ignore[index]
    if status == scripts.LOST:
        return RecordLost(write.session_id)
    if status in (scripts.STALE, scripts.WRONG_LEN):
        return Aborted("OWNERSHIP_LOST", f"session {write.session_id} is continued by another owner")
    try:
        _raise_for(status, write.session_id)
    except OutriderError as error:
        return error
    return None


def _raise_for(status: int, session_id: str) -> None:
    if status == scripts.MISSING:
        raise unknown_session(session_id)
    if status == scripts.CLOSED:
        raise _closed(session_id)
    if status == scripts.WRONG_LEN:
        raise RecordMoved(session_id)


def _busy(session_id: str) -> Aborted:
    message = f"session {session_id} was taken by another request at the same moment"
    return Aborted("SESSION_BUSY", message, retry_after_ms=200)


def unknown_session(session_id: str) -> NotFound:
    """What everybody but its owner is told of a session, too."""
    return NotFound("UNKNOWN_SESSION", f"no session {session_id}", field="session_id")


def _closed(session_id: str) -> FailedPrecondition:
    return FailedPrecondition("SESSION_CLOSED", f"session {session_id} was closed", field="session_id")
