"""Commits on their way to the session store.

Owns: gathering the waiting commits of all sessions into one round trip, retrying while the store is away, and each
session's order and number of commits in flight. Must not know: generations, what is done once tokens are durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import tenacity

from services.common.errors import Internal, OutriderError, Unavailable
from services.common.service import end_tasks
from services.common.session_store import Commit

log = logging.getLogger(__name__)

MAX_COMMITS_IN_FLIGHT = 2
"""Of one session; each of any number of tokens."""

_TURNS_BEFORE_WRITE = 2
"""Turns of the event loop before a round trip: the same moment's items to workers go out first, and commits gather."""


class CommitStore(Protocol):
    """What the committer needs of services.common.session_store.SessionStore."""

    async def commit_all(self, commits: Sequence[Commit]) -> list[OutriderError | None]: ...


class _Waiting(NamedTuple):
    commit: Commit
    settle: Callable[[OutriderError | None], None]


class Committer:
    """One for each coordinator. While one round trip is under way, the next one's commits gather."""

    def __init__(self, store: CommitStore, *, retry_s: float) -> None:
        self._store = store
        self._waiting: list[_Waiting] = []
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            stop=tenacity.stop_after_delay(retry_s),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
            reraise=True,
        )

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        """Stops; commits that still wait are settled as Unavailable."""
        if self._task is not None:
            await end_tasks(self._task)

    def submit(self, commit: Commit, settle: Callable[[OutriderError | None], None]) -> None:
        """Queues a commit; `settle` is called once, from the event loop, with None when it is durable."""
        self._waiting.append(_Waiting(commit, settle))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[_Waiting] = []
        try:
            while True:
                if not self._waiting:
                    self._waiter = loop.create_future()
                    await self._waiter
                for _ in range(_TURNS_BEFORE_WRITE):
                    await asyncio.sleep(0)
                batch, self._waiting = self._waiting, []
                for waiting, outcome in zip(batch, await self._write(batch), strict=True):
                    waiting.settle(outcome)
                batch = []
        finally:
            for waiting in batch + self._waiting:
                waiting.settle(Unavailable("STORE_UNAVAILABLE", "the coordinator stopped before the commit was stored"))

    async def _write(self, batch: list[_Waiting]) -> list[OutriderError | None]:
        commits = [waiting.commit for waiting in batch]
        try:
            with contextlib.suppress(Unavailable):
                return await self._store.commit_all(commits)
            return await self._retrying(self._store.commit_all, commits)
        except OutriderError as error:
            log.warning("%d commits failed: %s", len(batch), error)
            return [error] * len(batch)
        except Exception:
            log.exception("%d commits failed", len(batch))
            return [Internal("DEFECT", "internal error; the server's log has the detail")] * len(batch)


class Journal:
    """One generation's commits, in order. After the first failure nothing more is written.

    `durable_len` <= `len` <= what the generation holds: stored for certain, and handed to the committer.
    """

    def __init__(self, committer: Committer, session_id: str, lease_epoch: int, stored_len: int) -> None:
        self._committer = committer
        self._session_id = session_id
        self._lease_epoch = lease_epoch
        self._len = stored_len
        self._num_in_flight = 0
        self._waiter: asyncio.Future[None] | None = None
        self.durable_len = stored_len
        self.failure: OutriderError | None = None
        self.on_failure: Callable[[OutriderError], None] | None = None

    async def append(
        self,
        token_ids: Sequence[int],
        origins: bytes,
        log_probs: bytes,
        fields: Mapping[str, str],
        on_durable: Callable[[], None],
    ) -> None:
        """Queues a commit; waits only while MAX_COMMITS_IN_FLIGHT others are under way. Raises the journal's failure.

        `on_durable` is called when the tokens are stored, in the order of the appends, and never after a failure.
        """
        await self._until_in_flight_below(MAX_COMMITS_IN_FLIGHT)
        self._submit(token_ids, origins, log_probs, fields, on_durable)

    def note(self, fields: Mapping[str, str]) -> None:
        """Queues a write of fields alone, without waiting; does nothing after a failure."""
        if self.failure is None:
            self._submit((), b"", b"", fields, lambda: None)

    async def drain(self) -> None:
        """Waits until nothing is in flight. Raises the journal's failure."""
        await self._until_in_flight_below(1)

    async def settle(self) -> None:
        """As `drain`, but does not raise: afterwards no write of this journal can arrive any more."""
        with contextlib.suppress(OutriderError):
            while self._num_in_flight:
                await self._wait()

    def _submit(
        self,
        token_ids: Sequence[int],
        origins: bytes,
        log_probs: bytes,
        fields: Mapping[str, str],
        on_durable: Callable[[], None],
    ) -> None:
        commit = Commit(self._session_id, self._lease_epoch, self._len, token_ids, origins, log_probs, fields)
        self._len += len(token_ids)
        end = self._len
        self._num_in_flight += 1

        def settle(outcome: OutriderError | None) -> None:
            self._num_in_flight -= 1
            if outcome is not None and self.failure is None:
                self.failure = outcome
                if self.on_failure is not None:
                    self.on_failure(outcome)
            if self.failure is None:
                self.durable_len = end
                on_durable()
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

        self._committer.submit(commit, settle)

    async def _until_in_flight_below(self, limit: int) -> None:
        while self.failure is None and self._num_in_flight >= limit:
            await self._wait()
        if self.failure is not None:
            raise self.failure

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
