"""A failure is reported once and heard by whoever waits."""

from __future__ import annotations

import asyncio
import contextlib

from services.common.errors import WorkerFailed
from services.common.failure import Failure


async def test_the_first_report_counts() -> None:
    failure, first = Failure(), WorkerFailed("first")
    assert failure.error is None
    waiting = asyncio.ensure_future(failure.wait())
    await asyncio.to_thread(failure.report, first)
    failure.report(WorkerFailed("second"))
    assert failure.error is first
    assert await waiting is first


async def test_a_waiter_that_is_cancelled_leaves_it_to_others() -> None:
    failure, error = Failure(), WorkerFailed("lost")
    waiting = asyncio.ensure_future(failure.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    failure.report(error)
    assert await failure.wait() is error
