"""Records on their way to the session store.

Owns: gathering what all journals have to write into one round trip, repeating it until it is answered, and the notion
that the store is away. Must not know: generations, what is done once tokens may go out.
Invariant: while the store answers, a token is released by its acknowledgement and by nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import tenacity

from services.common.errors import Internal, OutriderError, Unavailable
from services.common.patience import PatientTimer
from services.common.service import end_tasks
from services.common.session_record import RecordLost, Write
from services.coordinator.journal import Journal

log = logging.getLogger(__name__)

_TURNS_BEFORE_WRITE = 2
"""Turns of the event loop before a round trip: the same moment's items to workers go out first, and writes gather."""
_MAX_WRITES = 256
"""A round trip's; whole records may be among them."""
_MAX_BACKOFF_S = 0.25


class Outage(Enum):
    """What running generations do while the store is away."""

    CONTINUE = "continue"
    """Go on; their records are completed later."""
    STOP = "stop"
    """End with Unavailable STORE_UNAVAILABLE, resumable."""


class WriteStore(Protocol):
    """What the committer needs of services.common.session_store.SessionStore."""

    async def write_all(self, writes: Sequence[Write]) -> list[OutriderError | RecordLost | None]: ...


class Committer:
    """One for each coordinator. While one round trip is under way, the next one's writes gather in their journals.

    The store counts as away once a write has waited `outage_after_s` for its answer, in this event loop's own time
    (services.common.patience). Memory is bounded by that of the running generations:
    what waits lies in the journals' copies, and while the store is away no generation can begin.
    """

    def __init__(self, store: WriteStore, *, outage: Outage = Outage.CONTINUE, outage_after_s: float) -> None:
        self._store = store
        self._outage = outage
        self._outage_after_s = outage_after_s
        self._asking: dict[Journal, None] = {}
        self._under_way: list[Journal] = []
        self._behind: dict[str, Journal] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._away_since: float | None = None
        self._stopped = False
        self._retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=_MAX_BACKOFF_S),
        )

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        """Stops; what still waits is given up, and so is whatever comes later: the records stay as they are."""
        self._stopped = True
        if self._task is not None:
            await end_tasks(self._task)

    @property
    def away(self) -> bool:
        """Whether the store has not answered for too long."""
        return self._away_since is not None

    def is_behind(self, session_id: str) -> bool:
        """Whether the record lacks tokens that went out from here while the store was away."""
        journal = self._behind.get(session_id)
        return journal is not None and not journal.is_complete

    def ask(self, journal: Journal) -> None:
        """Has what `journal` holds written, soon; after `aclose` it is refused at once."""
        if self._stopped:
            journal.answered(_stopped())
            return
        self._asking[journal] = None
        if self.away:
            self._let_go(journal)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not self._asking:
                    self._waiter = loop.create_future()
                    await self._waiter
                for _ in range(_TURNS_BEFORE_WRITE):
                    await asyncio.sleep(0)
                self._under_way = [*self._asking][:_MAX_WRITES]
                for journal in self._under_way:
                    del self._asking[journal]
                outcomes = await self._write([journal.take() for journal in self._under_way])
                self._answer(outcomes)
        finally:
            for journal in [*self._under_way, *self._asking]:
                journal.answered(_stopped())

    def _answer(self, outcomes: Sequence[OutriderError | RecordLost | None]) -> None:
        answered, self._under_way = self._under_way, []
        for journal, outcome in zip(answered, outcomes, strict=True):
            if outcome is not None:
                log.warning("session %s: a write was refused: %r", journal.session_id, outcome)
            journal.answered(outcome)
            if self._behind.get(journal.session_id) is journal and journal.is_complete:
                del self._behind[journal.session_id]

    async def _write(self, writes: list[Write]) -> Sequence[OutriderError | RecordLost | None]:
        """Repeats the writes until they are answered."""
        timer = PatientTimer(self._outage_after_s, self._be_away)
        try:
            try:
                return await self._store.write_all(writes)
            except Unavailable:
                return await self._retrying(self._store.write_all, writes)
        except Exception:
            log.exception("%d writes failed", len(writes))
            return [Internal("DEFECT", "internal error; the server's log has the detail")] * len(writes)
        finally:
            timer.cancel()
            if self._away_since is not None:
                log.warning("the session store is back after %.1f s", time.monotonic() - self._away_since)
                self._away_since = None

    def _be_away(self) -> None:
        log.warning("the session store does not answer; running generations %s", self._outage.value)
        self._away_since = time.monotonic()
        for journal in [*self._under_way, *self._asking]:
            self._let_go(journal)

    def _let_go(self, journal: Journal) -> None:
        self._behind[journal.session_id] = journal
        if self._outage is Outage.CONTINUE:
            journal.let_go()
        else:
            message = "the session store does not answer; resume when it is back"
            journal.give_up(Unavailable("STORE_UNAVAILABLE", message, retry_after_ms=1000))


def _stopped() -> Unavailable:
    return Unavailable("STORE_UNAVAILABLE", "the coordinator stopped before the commit was stored")
