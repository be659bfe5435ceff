"""What each owner of API keys uses of all coordinators together, in Redis beside the records.

Owns: the counts of requests, tokens and sessions that coordinators share, and how they change in one step.
Must not know: keys, gRPC, what a refused client is told.
Nothing is tried twice and nothing has to be undone: a coordinator that dies stops renewing its sessions, which then
lapse, and buckets drain by themselves.

    outrider:quota:{owner}:requests    hash: `spent` as of the second `at`; drains at the owner's rate
    outrider:quota:{owner}:tokens      the same
    outrider:quota:{owner}:sessions    sorted set: session_id by the second at which it lapses unless it is renewed
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError

LEASE_S = 5
"""A session that no coordinator has renewed for this long runs no more."""
_MAX_ASKING = 16
"""Questions at the same moment; the others wait, and leave connections to those who need the records
(services.common.redis_client.MIN_CONNECTIONS)."""

_BUCKET = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local function spent_of(key, rate)
  local stored = redis.call('HMGET', key, 'spent', 'at')
  if not stored[1] then return 0 end
  return math.max(0, tonumber(stored[1]) - rate * math.max(0, now - tonumber(stored[2])))
end
local function store(key, spent, rate)
  redis.call('HSET', key, 'spent', string.format('%.9f', spent), 'at', string.format('%.6f', now))
  redis.call('EXPIRE', key, math.min(86400, math.ceil(spent / rate) + 60))
end
"""

_REQUEST = (
    _BUCKET
    + """
-- KEYS: requests. ARGV: rate, capacity.
local rate, spent = tonumber(ARGV[1]), spent_of(KEYS[1], tonumber(ARGV[1]))
local admitted = spent + 1 <= tonumber(ARGV[2])
if admitted then spent = spent + 1 end
store(KEYS[1], spent, rate)
return {admitted and 1 or 0, string.format('%.9f', spent)}
"""
)

_USE = (
    _BUCKET
    + """
-- KEYS: tokens, sessions. ARGV: tokens a minute and most sessions (0 = no limit), tokens used, lease seconds,
--       session to enter ('' = none), number of sessions that ended, those, then the sessions that go on.
local capacity, max_sessions, lease = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[4])
local rate, spent, admitted, others = capacity / 60, 0, true, 0
if capacity > 0 then
  spent = spent_of(KEYS[1], rate) + tonumber(ARGV[3])
  store(KEYS[1], spent, rate)
  admitted = ARGV[5] == '' or spent + 1 <= capacity
end
if max_sessions > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  local first = 7 + tonumber(ARGV[6])
  for i = 7, first - 1 do redis.call('ZREM', KEYS[2], ARGV[i]) end
  for i = first, #ARGV do redis.call('ZADD', KEYS[2], now + lease, ARGV[i]) end
  if ARGV[5] ~= '' then
    others = redis.call('ZCARD', KEYS[2]) - (redis.call('ZSCORE', KEYS[2], ARGV[5]) and 1 or 0)
    admitted = admitted and others < max_sessions
    if admitted then redis.call('ZADD', KEYS[2], now + lease, ARGV[5]) end
  end
  redis.call('EXPIRE', KEYS[2], lease + 60)
end
return {admitted and 1 or 0, string.format('%.9f', spent), others}
"""
)


class Use(NamedTuple):
    """What an owner has used of one coordinator since it said so last, and its limits; 0 is no limit."""

    owner: str
    tokens_per_min: int
    max_sessions: int
    num_tokens: int = 0
    ended: tuple[str, ...] = ()
    running: tuple[str, ...] = ()


class Answer(NamedTuple):
    """Of the fleet: whether there was room, what the bucket holds now, and the other sessions that run."""

    admitted: bool
    spent: float
    num_other_sessions: int = 0


class QuotaLedger:
    """Belongs to one event loop. Once the store has failed nothing is asked of it until a `report` gets through."""

    def __init__(self, redis: Redis, lease_s: int = LEASE_S) -> None:
        self._redis = redis
        self._lease_s = lease_s
        self._request = redis.register_script(_REQUEST)
        self._use = redis.register_script(_USE)
        self._away = False
        self._gate = asyncio.Semaphore(_MAX_ASKING)

    @property
    def away(self) -> bool:
        """Whether the store failed last."""
        return self._away

    async def request(self, owner: str, rate: float, capacity: float) -> Answer | None:
        """Takes one request out of the bucket, if it is there. None: the store is away."""
        async with self._gate:
            if self._away:
                return None
            try:
                admitted, spent = await self._request(keys=[_key(owner, "requests")], args=[rate, capacity])
            except (RedisError, OSError):
                self._away = True
                return None
        return Answer(bool(admitted), float(spent))

    async def enter(self, use: Use, session_id: str) -> Answer | None:
        """Reports a use, then holds one more session if there is room for it. None: the store is away."""
        async with self._gate:
            if self._away:
                return None
            try:
                return _answer(await self._use(keys=_keys(use), args=self._arguments(use, session_id)))
            except (RedisError, OSError):
                self._away = True
                return None

    async def report(self, uses: Sequence[Use]) -> list[Answer] | None:
        """Several owners' uses, in one round trip; what runs is held for one more lease. None: the store is away."""
        if not (uses or self._away):
            return []
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.ping()
                for use in uses:
                    await self._use(keys=_keys(use), args=self._arguments(use, ""), client=pipeline)
                answers = [_answer(reply) for reply in (await pipeline.execute())[1:]]
        except (RedisError, OSError):
            self._away = True
            return None
        self._away = False
        return answers

    def _arguments(self, use: Use, session_id: str) -> list[str | int]:
        limits = [use.tokens_per_min, use.max_sessions]
        return [*limits, use.num_tokens, self._lease_s, session_id, len(use.ended), *use.ended, *use.running]


def _answer(reply: Sequence[bytes | int]) -> Answer:
    return Answer(bool(reply[0]), float(reply[1]), int(reply[2]))


def _keys(use: Use) -> list[str]:
    return [_key(use.owner, name) for name in ("tokens", "sessions")]


def _key(owner: str, name: str) -> str:
    return f"outrider:quota:{{{owner}}}:{name}"
