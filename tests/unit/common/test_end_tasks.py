"""Tasks end though a library swallows the first cancellation."""

from __future__ import annotations

import asyncio
import contextlib

from services.common.service import end_tasks


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again():
    started = asyncio.Event()

    async def stubborn() -> None:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await started.wait()
    await asyncio.wait_for(end_tasks(task), 5)
    assert task.cancelled()
