"""What each owner of API keys uses of this coordinator, and when that is enough.

Owns: the counts, and what a refused client is told. Must not know: keys, gRPC, what a generation is.
Limits are counted by each coordinator for itself.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator

from services.common.api_keys import KeyOwner
from services.common.errors import ResourceExhausted

_SESSION_RETRY_MS = 1000


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

    def _refill(self, rate: float, now: float) -> None:
        self._spent = max(0.0, self._spent - rate * (now - self._updated))
        self._updated = now


class _Usage:
    """Of one owner."""

    def __init__(self, now: float) -> None:
        self.requests = TokenBucket(now)
        self.tokens = TokenBucket(now)
        self.sessions: Counter[str] = Counter()


class Quotas:
    """Counts and refuses. One event loop. Limits are taken from the owner at each call, so that they may change."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usages: dict[str, _Usage] = {}

    def count_request(self, owner: KeyOwner) -> None:
        """Raises ResourceExhausted RATE_LIMITED where the owner's requests come too fast."""
        rate, now = owner.limits.requests_per_s, self._clock()
        if not rate:
            return
        bucket = self._usage(owner).requests
        if wait_s := bucket.wait_s(1.0, rate, max(1.0, rate), now):
            raise _limited(f"more than {rate:g} requests a second", wait_s)
        bucket.take(1.0)

    @contextlib.contextmanager
    def generation(self, owner: KeyOwner, session_id: str) -> Iterator[Callable[[int], None]]:
        """Holds one of the owner's sessions; the value counts tokens, of the prompt and of the answer.

        Raises ResourceExhausted RATE_LIMITED while the tokens of the last minute exceed the limit, TOO_MANY_SESSIONS
        where as many other sessions run as may.
        """
        usage, limits = self._usage(owner), owner.limits
        rate = limits.tokens_per_min / 60
        if rate and (wait_s := usage.tokens.wait_s(1.0, rate, limits.tokens_per_min, self._clock())):
            raise _limited(f"more than {limits.tokens_per_min} tokens a minute", wait_s)
        if limits.max_sessions and session_id not in usage.sessions and len(usage.sessions) >= limits.max_sessions:
            raise ResourceExhausted(
                "TOO_MANY_SESSIONS",
                f"{limits.max_sessions} sessions of this API key's owner are running, which is the limit",
                retry_after_ms=_SESSION_RETRY_MS,
            )
        usage.sessions[session_id] += 1
        try:
            yield usage.tokens.take
        finally:
            usage.sessions[session_id] -= 1
            if not usage.sessions[session_id]:
                del usage.sessions[session_id]

    def _usage(self, owner: KeyOwner) -> _Usage:
        if owner.name not in self._usages:
            self._usages[owner.name] = _Usage(self._clock())
        return self._usages[owner.name]


def _limited(what: str, wait_s: float) -> ResourceExhausted:
    return ResourceExhausted(
        "RATE_LIMITED", f"{what} were sent with this API key, which is the limit", retry_after_ms=int(1e3 * wait_s) + 1
    )
