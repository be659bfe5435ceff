"""How much each client holds in the session store, and the limits on that.

Owns: a count of sessions and tokens for each owner key, in Redis beside the records, for all coordinators together.
Must not know: the records themselves. The counts cannot drift for long: a session's entry expires by idleness as its
record does, sums change in the same script as the entries, and what a crash left behind goes with its entry.

    outrider:usage:{owner_key}:expiry      sorted set: session_id by the second at which it expires
    outrider:usage:{owner_key}:tokens      hash: session_id -> tokens that it holds, or may come to hold
    outrider:usage:{owner_key}:total       the sum of those
"""

from __future__ import annotations

from typing import NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.errors import ResourceExhausted, Unavailable

_OK, _TOO_MANY_SESSIONS, _TOO_MANY_TOKENS = 0, 1, 2

_COUNT = """
-- KEYS: expiry, tokens, total. ARGV: session_id, its tokens ('' = it is gone), idle seconds,
--       most sessions, most tokens (0 = no limit; a session that does not grow is never refused).
local now = tonumber(redis.call('TIME')[1])
local total = tonumber(redis.call('GET', KEYS[3]) or '0')
local function remove(session)
  total = total - tonumber(redis.call('HGET', KEYS[2], session) or '0')
  redis.call('ZREM', KEYS[1], session)
  redis.call('HDEL', KEYS[2], session)
end
for _, session in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 1000)) do remove(session) end

local before = redis.call('HGET', KEYS[2], ARGV[1])
local tokens = tonumber(ARGV[2] == '' and '0' or ARGV[2])
local max_sessions, max_tokens = tonumber(ARGV[4]), tonumber(ARGV[5])
local status, number = 0, 0
local grown = tokens - tonumber(before or '0')
if max_sessions > 0 and not before and redis.call('ZCARD', KEYS[1]) >= max_sessions then
  status, number = 1, redis.call('ZCARD', KEYS[1])
elseif max_tokens > 0 and grown > 0 and total + grown > max_tokens then
  status, number = 2, total
else
  remove(ARGV[1])
  if ARGV[2] ~= '' then
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[1])
    redis.call('HSET', KEYS[2], ARGV[1], tokens)
    total = total + tokens
  end
end
redis.call('SET', KEYS[3], string.format('%.0f', total))
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ARGV[3] + 60) end
return {status, number}
"""


class Caps(NamedTuple):
    """Of one client; 0 is no limit."""

    max_sessions: int
    max_tokens: int


class SessionUsage:
    """Belongs to one event loop. `note` collects what `flush` writes, so that ends of generations wait for nothing."""

    def __init__(self, redis: Redis, caps: Caps, *, idle_s: int) -> None:
        self._count = redis.register_script(_COUNT)
        self._redis = redis
        self._caps = caps
        self._idle_s = idle_s
        self._noted: dict[tuple[str, str], int | None] = {}

    async def reserve(self, owner_key: str, session_id: str, num_tokens: int) -> None:
        """Counts a session with the most tokens that it may come to hold.

        Raises ResourceExhausted SESSION_LIMIT or TOKEN_LIMIT, naming the limit; Unavailable STORE_UNAVAILABLE.
        """
        if not any(self._caps):
            return
        self._noted.pop((owner_key, session_id), None)
        arguments = self._arguments(session_id, num_tokens, self._caps)
        try:
            status, number = await self._count(keys=_keys(owner_key), args=arguments)
        except (RedisError, OSError) as error:
            message = f"the session store cannot be reached: {type(error).__name__}"
            raise Unavailable("STORE_UNAVAILABLE", message, retry_after_ms=1000) from error
        if status == _TOO_MANY_SESSIONS:
            limit = self._caps.max_sessions
            raise _exhausted(
                "SESSION_LIMIT", f"the client has {number} sessions; max_client_sessions is {limit}", limit
            )
        if status == _TOO_MANY_TOKENS:
            limit = self._caps.max_tokens
            message = (
                f"{num_tokens} tokens in this session, beside the {number} that the client has stored or asked for, "
                f"exceed max_client_tokens, which is {limit}"
            )
            raise _exhausted("TOKEN_LIMIT", message, limit)

    def note(self, owner_key: str, session_id: str, num_tokens: int | None) -> None:
        """What the session holds from now on; None: it is gone."""
        if any(self._caps):
            self._noted[owner_key, session_id] = num_tokens

    async def flush(self) -> None:
        """Writes what was noted, in one round trip. While the store is away it waits for the next flush."""
        noted = dict(self._noted)
        if not noted:
            return
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for (owner_key, session_id), num_tokens in noted.items():
                    arguments = self._arguments(session_id, num_tokens, Caps(0, 0))
                    await self._count(keys=_keys(owner_key), args=arguments, client=pipeline)
                await pipeline.execute()
        except (RedisError, OSError):
            return
        for key, num_tokens in noted.items():
            if self._noted.get(key) == num_tokens:
                del self._noted[key]

    def _arguments(self, session_id: str, num_tokens: int | None, caps: Caps) -> list[str | int]:
        return [session_id, "" if num_tokens is None else num_tokens, self._idle_s, *caps]


def _keys(owner_key: str) -> list[str]:
    return [f"outrider:usage:{{{owner_key}}}:{name}" for name in ("expiry", "tokens", "total")]


def _exhausted(reason: str, message: str, limit: int) -> ResourceExhausted:
    return ResourceExhausted(reason, message, metadata={"limit": str(limit)})
