"""What each owner of API keys uses, and when that is enough.

Owns: the counts of this coordinator, their meeting with the fleet's, and what a refused client is told. Must not know:
keys, gRPC, what a generation is, where the fleet counts.

All coordinators count together; a bucket here is at most behind the fleet's, so what it refuses costs no question.
While the fleet cannot be asked, each coordinator goes by its own counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from services.common.api_keys import KeyOwner, Limits
from services.common.errors import ResourceExhausted
from services.common.quota_ledger import Answer, Use
from services.common.service import end_tasks

_SESSION_RETRY_MS = 1000
_REPORT_S = 1.0
"""Between reports to the fleet: what others may lag behind the tokens of this coordinator. Well below a lease."""


class Ledger(Protocol):
    """The fleet's counts, as services.common.quota_ledger keeps them. None for an answer: they cannot be asked now."""

    @property
    def away(self) -> bool:
        """Whether it did not answer last; only a report asks it then."""
        ...

    async def request(self, owner: str, rate: float, capacity: float) -> Answer | None: ...

    async def enter(self, use: Use, session_id: str) -> Answer | None: ...

    async def report(self, uses: Sequence[Use]) -> list[Answer] | None: ...


class Alone:
    """The ledger of a coordinator that shares its counts with nobody."""

    away = True

    async def request(self, owner: str, rate: float, capacity: float) -> None:
        return None

    async def enter(self, use: Use, session_id: str) -> None:
        return None

    async def report(self, uses: Sequence[Use]) -> None:
        return None


class TokenBucket:
    """Fills with `rate` a second up to `capacity`, full at first. May be overdrawn: then it is paid back first."""

    def __init__(self, now: float) -> None:
        self._spent = 0.0
        self._updated = now

    def wait_s(self, least: float, rate: float, capacity: float, now: float) -> float:
        """Seconds until at least `least` are in it; 0 when they are."""
        self._refill(rate, now)
        return max(0.0, (least - (capacity - self._spent)) / rate)

    def take(self, count: float) -> None:
        self._spent += count

    def catch_up(self, spent: float) -> None:
        """With the fleet's bucket, which holds what others took as well."""
        self._spent = max(self._spent, spent)

    def _refill(self, rate: float, now: float) -> None:
        self._spent = max(0.0, self._spent - rate * (now - self._updated))
        self._updated = now


class _Usage:
    """Of one owner."""

    def __init__(self, now: float) -> None:
        self.requests = TokenBucket(now)
        self.tokens = TokenBucket(now)
        self.sessions: Counter[str] = Counter()
        self.limits = Limits()
        self._num_unreported = 0
        self._ended: set[str] = set()

    def take_tokens(self, count: int) -> None:
        self.tokens.take(count)
        self._num_unreported += count

    def hold(self, session_id: str) -> None:
        self.sessions[session_id] += 1

    def release(self, session_id: str, *, told: bool) -> None:
        """`told`: the fleet knows of it."""
        self.sessions[session_id] -= 1
        if not self.sessions[session_id]:
            del self.sessions[session_id]
            if told:
                self.left(session_id)

    def left(self, session_id: str) -> None:
        """The fleet is to be told, unless it is held again by then."""
        self._ended.add(session_id)

    @property
    def shared(self) -> bool:
        """Whether there is something that the fleet counts."""
        return bool(self.limits.tokens_per_min or self.limits.max_sessions)

    @property
    def held(self) -> bool:
        """Whether the fleet holds sessions of this coordinator."""
        return bool(self.limits.max_sessions and self.sessions)

    @property
    def unreported(self) -> bool:
        return self.shared and bool(self._num_unreported or self._ended)

    def tokens_used(self, owner: str) -> Use:
        """Since the last report; they count as reported from now on."""
        use = Use(owner, self.limits.tokens_per_min, self.limits.max_sessions, self._num_unreported)
        self._num_unreported = 0
        return use

    def used(self, owner: str, *, renew: bool) -> Use:
        """The same, with the sessions that ended; with those that go on to `renew` them."""
        ended = tuple(self._ended - self.sessions.keys())
        self._ended.clear()
        return self.tokens_used(owner)._replace(ended=ended, running=tuple(self.sessions) if renew else ())


class Quotas:
    """Counts and refuses. One event loop. Limits are taken from the owner at each call, so that they may change."""

    def __init__(self, ledger: Ledger | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger or Alone()
        self._clock = clock
        self._usages: dict[str, _Usage] = {}
        self._reporting = asyncio.Lock()

    async def count_request(self, owner: KeyOwner) -> None:
        """Raises ResourceExhausted RATE_LIMITED where the owner's requests come too fast."""
        rate = owner.limits.requests_per_s
        if not rate:
            return
        capacity, bucket = max(1.0, rate), self._usage(owner).requests
        wait_s = bucket.wait_s(1.0, rate, capacity, self._clock())
        if not wait_s and (fleet := await self._ledger.request(owner.name, rate, capacity)):
            bucket.catch_up(fleet.spent - fleet.admitted)
            wait_s = 0.0 if fleet.admitted else max(1e-3, bucket.wait_s(1.0, rate, capacity, self._clock()))
        if wait_s:
            raise _limited(f"more than {rate:g} requests a second", wait_s)
        bucket.take(1.0)

    @contextlib.asynccontextmanager
    async def generation(self, owner: KeyOwner, session_id: str) -> AsyncIterator[Callable[[int], None]]:
        """Holds one of the owner's sessions; the value counts tokens, of the prompt and of the answer.

        Raises ResourceExhausted RATE_LIMITED while the tokens of the last minute exceed the limit, TOO_MANY_SESSIONS
        where as many other sessions run as may.
        """
        usage = self._usage(owner)
        self._check(usage, len(usage.sessions) - (session_id in usage.sessions))
        if told := usage.shared:
            try:
                await self._enter(usage, owner.name, session_id)
            except asyncio.CancelledError:
                usage.left(session_id)  # the fleet may hold it all the same
                raise
        usage.hold(session_id)
        try:
            yield usage.take_tokens
        finally:
            usage.release(session_id, told=told)
            # Before the client hears of the end: there is room at every coordinator for its next one.
            if told and not self._ledger.away:
                await self.report(renew=False)

    @contextlib.asynccontextmanager
    async def reporting(self) -> AsyncIterator[None]:
        """Tells the fleet of what is used, from enter to exit."""

        async def report_on() -> None:
            while True:
                await asyncio.sleep(_REPORT_S)
                await self.report()

        task = asyncio.create_task(report_on())
        try:
            yield
        finally:
            await end_tasks(task)

    async def report(self, *, renew: bool = True) -> None:
        """Tells the fleet what is new, at once; `renew`: and which sessions go on.

        One at a time: an older report cannot hold a session that a newer one gave back. Whoever waits for another's
        report mostly finds that it said everything.
        """
        async with self._reporting:
            news = [(name, usage) for name, usage in self._usages.items() if usage.unreported or (renew and usage.held)]
            answers = await self._ledger.report([usage.used(name, renew=renew) for name, usage in news])
            for (_, usage), answer in zip(news, answers or (), strict=False):
                usage.tokens.catch_up(answer.spent)

    async def _enter(self, usage: _Usage, owner: str, session_id: str) -> None:
        """Raises as `generation` where the fleet as a whole has used as much as may be."""
        if fleet := await self._ledger.enter(usage.tokens_used(owner), session_id):
            usage.tokens.catch_up(fleet.spent)
            try:
                self._check(usage, fleet.num_other_sessions)
            except ResourceExhausted:
                if fleet.admitted:  # what was used here meanwhile is too much
                    usage.left(session_id)
                raise

    def _check(self, usage: _Usage, num_other_sessions: int) -> None:
        tokens_per_min, max_sessions = usage.limits.tokens_per_min, usage.limits.max_sessions
        rate = tokens_per_min / 60
        if rate and (wait_s := usage.tokens.wait_s(1.0, rate, tokens_per_min, self._clock())):
            raise _limited(f"more than {tokens_per_min} tokens a minute", wait_s)
        if max_sessions and num_other_sessions >= max_sessions:
            raise ResourceExhausted(
                "TOO_MANY_SESSIONS",
                f"{max_sessions} sessions of this API key's owner are running, which is the limit",
                retry_after_ms=_SESSION_RETRY_MS,
            )

    def _usage(self, owner: KeyOwner) -> _Usage:
        if owner.name not in self._usages:
            self._usages[owner.name] = _Usage(self._clock())
        usage = self._usages[owner.name]
        usage.limits = owner.limits
        return usage


def _limited(what: str, wait_s: float) -> ResourceExhausted:
    return ResourceExhausted(
        "RATE_LIMITED", f"{what} were sent with this API key, which is the limit", retry_after_ms=int(1e3 * wait_s) + 1
    )
