"""Work that goes on when its caller is cancelled, and is undone."""

from __future__ import annotations

import asyncio

import pytest

from services.common.errors import Unavailable
from services.common.service import wait_until
from services.coordinator.unbroken import unbroken


class Door:
    """What was opened and closed; opening waits for `may_open`."""

    def __init__(self, failure: Unavailable | None = None) -> None:
        self.may_open = asyncio.Event()
        self.failure = failure
        self.events: list[str] = []

    async def open(self) -> str:
        self.events.append("begun")
        await self.may_open.wait()
        if self.failure:
            raise self.failure
        self.events.append("opened")
        return "door"

    async def close(self, what: str) -> None:
        self.events.append(f"{what} closed")


async def test_what_comes_of_the_work_is_returned_and_stays() -> None:
    door = Door()
    door.may_open.set()
    assert await unbroken(door.open(), door.close) == "door"
    assert door.events == ["begun", "opened"]


async def test_an_error_of_the_work_is_raised() -> None:
    door = Door(Unavailable("STORE_UNAVAILABLE", "away"))
    door.may_open.set()
    with pytest.raises(Unavailable):
        await unbroken(door.open(), door.close)


@pytest.mark.parametrize("failure", [None, Unavailable("STORE_UNAVAILABLE", "away")])
async def test_work_whose_caller_is_cancelled_ends_and_is_undone(failure: Unavailable | None) -> None:
    door = Door(failure)
    caller = asyncio.create_task(unbroken(door.open(), door.close))
    assert await wait_until(lambda: bool(door.events), 1.0)
    caller.cancel()
    await asyncio.sleep(0)
    door.may_open.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert door.events == (["begun"] if failure else ["begun", "opened", "door closed"])


async def test_a_second_cancellation_does_not_keep_it_from_being_undone() -> None:
    door = Door()
    caller = asyncio.create_task(unbroken(door.open(), door.close))
    for _ in range(2):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.wait([caller])
    door.may_open.set()
    assert await wait_until(lambda: door.events == ["begun", "opened", "door closed"], 1.0)
