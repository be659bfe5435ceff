"""Work that is done whole, even if who asked for it is cancelled meanwhile: broken off halfway, it would leave traces.

Owns: that its outcome is then undone. Must not know: what the work is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

from services.common.errors import OutriderError

log = logging.getLogger(__name__)
T = TypeVar("T")


async def unbroken(work: Coroutine[None, None, T], undo: Callable[[T], Awaitable[None]]) -> T:
    """What comes of `work`. A cancellation is raised only when the work has ended and its outcome is undone."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.cancelled():
            await asyncio.shield(asyncio.ensure_future(_undo(task, undo)))
        raise


async def _undo(task: asyncio.Future[T], undo: Callable[[T], Awaitable[None]]) -> None:
    try:
        outcome = await task
    except OutriderError as error:
        log.info("nothing is left of what nobody waits for any more: %s", error)
    else:
        await undo(outcome)
