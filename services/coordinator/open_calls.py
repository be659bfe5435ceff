"""How many calls each owner of API keys has under way at this coordinator, and when that is enough.

Owns: these counts and bounds. Must not know: keys, gRPC, what is asked.

A server takes so many calls on all connections together; then it refuses everybody. An owner gets half of them at most,
and all those without a key together a few, so that none can take the places of all others: by calls that never send
what they ask, above all. What calls cost is for services.coordinator.quotas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from services.common.api_keys import KeyOwner
from services.common.errors import ResourceExhausted

SPARE_CALLS = 32
"""Of one owner beside its generations: looks at sessions, and generations that wait to be refused."""
_RETRY_MS = 1000


class OpenCalls:
    """Counts and refuses. One event loop."""

    def __init__(self, max_generations: int) -> None:
        self._max_generations = max_generations
        self._counts: Counter[str | None] = Counter()

    def enter(self, owner: KeyOwner | None) -> Callable[[], None]:
        """Counts a call of `owner`, None being whoever has no key, until the result is called, which is done once.

        Raises ResourceExhausted TOO_MANY_CALLS.
        """
        name, most = _name(owner), self.most(owner)
        if self._counts.get(name, 0) >= most:
            whose = "without an API key" if owner is None else "of this API key's owner"
            raise ResourceExhausted(
                "TOO_MANY_CALLS", f"{most} calls {whose} are open, which is the limit", retry_after_ms=_RETRY_MS
            )
        self._counts[name] += 1
        return lambda: self._leave(name)

    def most(self, owner: KeyOwner | None) -> int:
        """Where an owner's sessions are limited, two calls for each: whoever resumes has left the other one open."""
        if owner is None:
            return SPARE_CALLS
        sessions = owner.limits.max_sessions
        return SPARE_CALLS + (min(2 * sessions, self._max_generations) if sessions else self._max_generations)

    def num_open(self, owner: KeyOwner | None) -> int:
        return self._counts.get(_name(owner), 0)

    def _leave(self, name: str | None) -> None:
        self._counts[name] -= 1
        if not self._counts[name]:
            del self._counts[name]


def _name(owner: KeyOwner | None) -> str | None:
    return owner.name if owner else None
