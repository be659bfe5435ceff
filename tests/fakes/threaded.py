"""The scripted coordinator on an event loop of its own, for commands that run theirs."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterator

from tests.fakes.coordinator import FakeCoordinator, serving


@contextlib.contextmanager
def serving_in_thread(fake: FakeCoordinator) -> Iterator[str]:
    """Yields the address; the thread has ended on exit."""
    addresses: queue.Queue[str] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving(fake) as address:
            addresses.put(address)
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield addresses.get(timeout=10)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
