"""The session record in Redis: tokens, who owns the session, and what its last generation was.

Owns: the record's keys, fields and encodings, and the fence: every write is a compare-and-set on owner_id, lease_epoch
and stored length (services.common.session_scripts). Must not know: workers, gRPC, how tokens come to be.

    outrider:{session_id}:meta         hash: the fields of SessionRecord
    outrider:{session_id}:tokens       uint32, little-endian
    outrider:{session_id}:origins      one byte a token, 0 = prompt
    outrider:{session_id}:log_probs    rows of the last generation, as the coordinator packs them
    outrider:coordinator:<owner_id>    present while that coordinator lives
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from services.common import session_scripts as scripts
from services.common.errors import Aborted, ConfigError, FailedPrecondition, NotFound, OutriderError, Unavailable
from services.common.values import FinishReason

PROMPT_ORIGIN = 0
"""The byte in `origins` of a token that nobody generated; others are TokenOrigin values."""
ANONYMOUS = "anonymous"
"""The owner key of sessions whose requests carry no credentials."""

_EVICTS = ("allkeys-", "volatile-")
_DIGESTS = {
    script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    for script in (scripts.ACQUIRE, scripts.COMMIT, scripts.CLOSE)
}


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """uint32, little-endian."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_token_ids(data: bytes) -> tuple[int, ...]:
    """The inverse of pack_token_ids."""
    return struct.unpack(f"<{len(data) // 4}I", data)


@dataclass(frozen=True, slots=True)
class KvHandle:
    """Where a role's KV cache of the session lies. Only a hint: losing it costs a prefill."""

    instance_id: str
    attempt: int
    num_cached_tokens: int

    def encode(self) -> str:
        return f"{self.instance_id} {self.attempt} {self.num_cached_tokens}"

    @classmethod
    def decode(cls, text: str) -> KvHandle | None:
        if not text:
            return None
        instance_id, attempt, num_cached_tokens = text.rsplit(" ", 2)
        return cls(instance_id, int(attempt), int(num_cached_tokens))


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What Redis holds of a session. `messages`, `parameters` and `statistics` are JSON of the coordinator's making."""

    session_id: str
    token_ids: tuple[int, ...]
    origins: bytes
    log_probs: bytes
    owner_id: str
    lease_epoch: int
    running: bool
    request_id: str
    request_digest: str
    owner_key: str
    model: str
    target_digest: str
    draft_digest: str
    seed: int
    prompt_len: int
    parameters: str
    messages: str
    reply: str
    finish_reason: FinishReason | None
    statistics: str
    target_handle: KvHandle | None
    draft_handle: KvHandle | None
    expires_in_s: int

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, slots=True)
class Acquisition:
    """Takes a session over and says what it shall then hold. `expected_epoch` None: the session must not exist yet.

    Of what is stored, `num_kept_tokens` and `num_kept_log_prob_bytes` stay; the rest is cut off before the appends.
    """

    session_id: str
    expected_epoch: int | None
    num_kept_tokens: int
    token_ids: Sequence[int]
    origins: bytes
    fields: Mapping[str, str]
    least_epoch: int = 0
    num_kept_log_prob_bytes: int = 0
    log_probs: bytes = b""


@dataclass(frozen=True, slots=True)
class Commit:
    """Appends a generation's next tokens behind `base_len`; `fields` go in with the same write."""

    session_id: str
    lease_epoch: int
    base_len: int
    token_ids: Sequence[int]
    origins: bytes
    log_probs: bytes = b""
    fields: Mapping[str, str] = field(default_factory=dict)


class SessionStore:
    """Reads and writes session records in the name of one owner. Safe for concurrent use by one event loop.

    Every method raises Unavailable STORE_UNAVAILABLE when Redis cannot be reached; nothing is retried here.
    """

    def __init__(self, redis: Redis, owner_id: str, *, idle_s: int, tombstone_s: int) -> None:
        self._redis = redis
        self._owner_id = owner_id
        self._idle_s = idle_s
        self._tombstone_s = tombstone_s

    @classmethod
    def connect(cls, url: str, owner_id: str, *, idle_s: int, tombstone_s: int, timeout_s: float = 2.0) -> SessionStore:
        """Opens no connection yet; each operation does when it needs one, and gives up after `timeout_s`.

        Raises ConfigError for a `url` of no known form.
        """
        try:
            redis = Redis.from_url(
                url,
                protocol=2,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                client_name="outrider",
            )
        except ValueError as error:
            # the error's own text may hold a part of the password
            raise ConfigError("redis_url: not a URL of the form redis://, rediss:// or unix://") from error
        return cls(redis, owner_id, idle_s=idle_s, tombstone_s=tombstone_s)

    @property
    def owner_id(self) -> str:
        return self._owner_id

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def check_server(self) -> None:
        """Raises ConfigError on a Redis that may evict records: a session ends by expiry or closing alone."""
        try:
            memory = await self._redis.info("memory")
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
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
            raise _unavailable(error) from error

    async def is_alive(self, owner_id: str) -> bool:
        """Whether that coordinator's heartbeat is there."""
        try:
            return bool(await self._redis.exists(_heartbeat_key(owner_id)))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def load(self, session_id: str, owner_key: str = ANONYMOUS) -> SessionRecord | None:
        """The session's record as of one moment; None if there is none.

        Raises FailedPrecondition SESSION_CLOSED where a tombstone stands, NotFound UNKNOWN_SESSION where record or
        tombstone belong to another key's owner.
        """
        meta_key, *value_keys = _keys(session_id)
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hgetall(meta_key)
        pipeline.mget(value_keys)
        pipeline.ttl(meta_key)
        try:
            meta, (token_ids, origins, log_probs), ttl_s = await pipeline.execute()
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        if not meta:
            return None
        fields = {name.decode(): value.decode() for name, value in meta.items()}
        if fields.get("owner_key", ANONYMOUS) != owner_key:
            raise unknown_session(session_id)
        if "closed" in fields:
            raise _closed(session_id)
        return _decode_record(session_id, fields, token_ids or b"", origins or b"", log_probs or b"", max(0, ttl_s))

    async def acquire(self, acquisition: Acquisition) -> int:
        """Makes this owner the session's, and returns its new lease_epoch: max(stored + 1, least, Redis time in ms).

        Raises Aborted SESSION_BUSY if the epoch is not the expected one: somebody else took the session meanwhile.
        """
        a = acquisition
        arguments: list[str | bytes | int] = [
            self._owner_id,
            "" if a.expected_epoch is None else str(a.expected_epoch),
            a.least_epoch,
            self._idle_s,
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
            raise Aborted("SESSION_BUSY", f"session {a.session_id} was taken by another request at the same moment")
        _raise_for(status, a.session_id)
        return number

    async def commit_all(self, commits: Sequence[Commit]) -> list[OutriderError | None]:
        """Writes all commits in order, in one round trip; the outcome of each, None meaning that it is stored.

        Sending the same commits again is harmless. Outcomes: Aborted OWNERSHIP_LOST (another owner or epoch, or the
        record is not what the commit builds upon), FailedPrecondition SESSION_CLOSED, NotFound UNKNOWN_SESSION.
        """
        replies = await self._commit_pipeline(commits)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            await self._load_scripts()
            for i, reply in zip(unknown, await self._commit_pipeline([commits[i] for i in unknown]), strict=True):
                replies[i] = reply
        return [_commit_outcome(commit, reply) for commit, reply in zip(commits, replies, strict=True)]

    async def close(self, session_id: str, owner_key: str = ANONYMOUS) -> None:
        """Leaves a tombstone in the session's place. Idempotent while it stands.

        Raises NotFound UNKNOWN_SESSION, also where it belongs to another key's owner.
        """
        status, _ = await self._evaluate(scripts.CLOSE, session_id, [self._tombstone_s, owner_key, ANONYMOUS])
        _raise_for(status, session_id)

    async def _commit_pipeline(self, commits: Sequence[Commit]) -> list[object]:
        pipeline = self._redis.pipeline(transaction=False)
        for c in commits:
            extra = [part for pair in c.fields.items() for part in pair]
            pipeline.execute_command(
                "EVALSHA",
                _DIGESTS[scripts.COMMIT],
                4,
                *_keys(c.session_id),
                self._owner_id,
                c.lease_epoch,
                c.base_len,
                self._idle_s,
                pack_token_ids(c.token_ids),
                c.origins,
                c.log_probs,
                *extra,
            )
        try:
            return list(await pipeline.execute(raise_on_error=False))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def _evaluate(self, script: str, session_id: str, arguments: list[str | bytes | int]) -> tuple[int, int]:
        keys_and_arguments = (*_keys(session_id), *arguments)
        try:
            try:
                reply = await self._redis.evalsha(_DIGESTS[script], 4, *keys_and_arguments)
            except NoScriptError:
                await self._load_scripts()
                reply = await self._redis.evalsha(_DIGESTS[script], 4, *keys_and_arguments)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        return int(reply[0]), int(reply[1])

    async def _load_scripts(self) -> None:
        try:
            for script in _DIGESTS:
                await self._redis.script_load(script)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error


def _keys(session_id: str) -> tuple[str, str, str, str]:
    base = f"outrider:{{{session_id}}}:"
    return base + "meta", base + "tokens", base + "origins", base + "log_probs"


def _heartbeat_key(owner_id: str) -> str:
    return f"outrider:coordinator:{owner_id}"


def _decode_record(
    session_id: str, fields: Mapping[str, str], token_ids: bytes, origins: bytes, log_probs: bytes, expires_in_s: int
) -> SessionRecord:
    finish = fields.get("finish_reason")
    return SessionRecord(
        session_id=session_id,
        token_ids=unpack_token_ids(token_ids),
        origins=origins,
        log_probs=log_probs,
        owner_id=fields["owner_id"],
        lease_epoch=int(fields["lease_epoch"]),
        running=fields.get("running") == "1",
        request_id=fields.get("request_id", ""),
        request_digest=fields.get("request_digest", ""),
        owner_key=fields.get("owner_key", ANONYMOUS),
        model=fields.get("model", ""),
        target_digest=fields.get("target_digest", ""),
        draft_digest=fields.get("draft_digest", ""),
        seed=int(fields.get("seed", "0")),
        prompt_len=int(fields.get("prompt_len", "0")),
        parameters=fields.get("parameters", ""),
        messages=fields.get("messages", ""),
        reply=fields.get("reply", ""),
        finish_reason=FinishReason(finish) if finish else None,
        statistics=fields.get("statistics", ""),
        target_handle=KvHandle.decode(fields.get("target_handle", "")),
        draft_handle=KvHandle.decode(fields.get("draft_handle", "")),
        expires_in_s=expires_in_s,
    )


def _commit_outcome(commit: Commit, reply: object) -> OutriderError | None:
    if isinstance(reply, Exception):
        return _unavailable(reply)
    status = int(reply[0])  # type: ignore[index]
    if status in (scripts.STALE, scripts.WRONG_LEN):
        return Aborted("OWNERSHIP_LOST", f"session {commit.session_id} is continued by another owner")
    try:
        _raise_for(status, commit.session_id)
    except OutriderError as error:
        return error
    return None


def _raise_for(status: int, session_id: str) -> None:
    if status == scripts.MISSING:
        raise unknown_session(session_id)
    if status == scripts.CLOSED:
        raise _closed(session_id)
    if status == scripts.WRONG_LEN:
        raise Aborted("OWNERSHIP_LOST", f"session {session_id} holds other tokens than expected")


def unknown_session(session_id: str) -> NotFound:
    """What everybody but its owner is told of a session, too."""
    return NotFound("UNKNOWN_SESSION", f"no session {session_id}", field="session_id")


def _closed(session_id: str) -> FailedPrecondition:
    return FailedPrecondition("SESSION_CLOSED", f"session {session_id} was closed", field="session_id")


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(
        "STORE_UNAVAILABLE", f"the session store cannot be reached: {type(error).__name__}", retry_after_ms=1000
    )
