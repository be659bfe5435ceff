"""The end of a worker that cannot go on: reported by whichever thread finds out, awaited by the one that serves.

Owns: that the first report counts. Must not know: what can fail.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from threading import Lock

from services.common.errors import WorkerFailed


class Failure:
    """At most one error. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._reported: Future[WorkerFailed] = Future()
        self._reported.set_running_or_notify_cancel()  # a waiter that is cancelled leaves it as it is

    def report(self, error: WorkerFailed) -> None:
        """Keeps the first error; later ones are its consequences."""
        with self._lock:
            if not self._reported.done():
                self._reported.set_result(error)

    @property
    def error(self) -> WorkerFailed | None:
        return self._reported.result() if self._reported.done() else None

    async def wait(self) -> WorkerFailed:
        """Returns once there is an error."""
        return await asyncio.wrap_future(self._reported)
