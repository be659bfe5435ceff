"""Waits in an event loop's own time."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from services.common.patience import NUM_TICKS, PatientTimer, patience
from tests.fakes.virtual_time import VirtualTimeLoop, run

PATIENCE_S, STANDSTILL_S = 0.1, 0.3


def test_a_body_that_takes_longer_is_ended_at_the_stated_time() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with patience(5.0):
                await asyncio.Event().wait()
        return loop.time()

    assert run(main(), VirtualTimeLoop()) == pytest.approx(5.0)


def test_a_body_that_ends_before_is_left_alone_and_nothing_comes_later() -> None:
    async def main() -> None:
        async with patience(5.0):
            await asyncio.sleep(4.9)
        await asyncio.sleep(100)

    run(main(), VirtualTimeLoop())


def test_a_cancelled_timer_never_calls() -> None:
    async def main() -> None:
        late: list[float] = []
        timer = PatientTimer(1.0, lambda: late.append(asyncio.get_running_loop().time()))
        await asyncio.sleep(0.95)
        timer.cancel()
        await asyncio.sleep(10)
        assert late == []

    run(main(), VirtualTimeLoop())


@pytest.mark.parametrize("run_main", [asyncio.run, uvloop.run])
def test_while_the_process_stands_still_nobody_is_late(
    run_main: Callable[[Coroutine[None, None, None]], None],
) -> None:
    async def main() -> None:
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=here)
        loop = asyncio.get_running_loop()
        try:
            async with patience(PATIENCE_S):
                loop.call_soon(_stand_still, there)
                assert await reader.readexactly(6) == b"answer"
        finally:
            writer.close()
            await writer.wait_closed()
            there.close()

    def _stand_still(peer: socket.socket) -> None:
        time.sleep(STANDSTILL_S)
        peer.sendall(b"answer")

    assert STANDSTILL_S > 2 * PATIENCE_S > PATIENCE_S / NUM_TICKS
    run_main(main())
